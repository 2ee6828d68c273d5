"""What a terminal is shown: text from outside is data, and the terminal obeys none of it.

Names of files and models, titles, error messages and answers come from strangers. Programs print
with `print` and with `console()`; both go through a stream that `make_streams_safe` puts in place,
so that no line of code has to remember it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

# Each of these becomes a visible symbol, one for one. So nothing can hide, no sequence has to be
# recognised, and it does not matter where a stream is cut: ESC ]52;… shows as ␛]52;….
_SYMBOLS: dict[int, int] = {
    **{c: 0x2400 + c for c in range(0x20)},  # C0 → ␀ … ␟
    0x7F: 0x2421,  # DEL → ␡
    **dict.fromkeys(range(0x80, 0xA0), 0x2426),  # C1, among them one-byte CSI and OSC → ␦
    # Marks of the direction of writing.
    **dict.fromkeys([0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x2070)], 0x2426),
    # Characters without a width or an effect, which would be hidden.
    **dict.fromkeys([0x180E, 0x200B, *range(0x2060, 0x2065), 0xFEFF], 0x2426),
    **dict.fromkeys([*range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080)], 0x2426),  # notes, tags
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),  # lone surrogates cannot be written
    0x2028: 0x2424,
    0x2029: 0x2424,  # line and paragraph separator → ␤
}
_TABLE: dict[int, int | None] = {**_SYMBOLS, 0x09: 0x09, 0x0A: 0x0A, 0x0D: None}
_UNSAFE = re.compile("[" + "".join(f"\\U{c:08x}" for c in _SYMBOLS if c not in (0x09, 0x0A)) + "]")


def visible(text: str) -> str:
    """Return `text` with a symbol for whatever a terminal would obey; carriage returns drop out.

    Joiners (of emoji, of Persian), combining marks and no-break spaces stay.
    """
    return text.translate(_TABLE)


def one_line(text: str) -> str:
    """Return `text`, made visible, in one line."""
    return " ".join(visible(text).split())


def shown(text: object) -> str:
    """Return what a stranger's file says as one visible line, short enough for a message."""
    line = one_line(str(text)[:200])
    return line if len(line) <= 100 else line[:99] + "…"


def json_line(value: object) -> str:
    """Write JSON in one line; whatever a terminal would obey is escaped, the value the same."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return _UNSAFE.sub(lambda match: json.dumps(match[0]).strip('"').replace("\x7f", "\\u007f"), text)


def print_event(kind: str, **fields: Any) -> None:
    """Print one event of a command with --json: an object in a line of its own, at once."""
    print(json_line({"event": kind} | fields), flush=True)


def make_safe(segments: Iterable[Segment]) -> list[Segment]:
    """Make what rich is about to draw safe, in the same number of cells; links become plain text.

    By now every text has its place. So what takes no cell, by rich's reckoning, is left out, as
    most controls are; to have it seen, show `visible(text)` in the first place.
    """
    return [_made_safe(segment) if _is_unsafe(segment) else segment for segment in segments]


def _is_unsafe(segment: Segment) -> bool:
    text, style, control = segment
    return not control and (_UNSAFE.search(text) is not None or (style is not None and style.link is not None))


def _made_safe(segment: Segment) -> Segment:
    from rich.cells import cell_len, set_cell_size
    from rich.segment import Segment

    text, style, _ = segment
    shown = _UNSAFE.sub(lambda match: visible(match[0]) if cell_len(match[0]) else "", text)
    if cell_len(shown) != cell_len(text):  # neighbours can have joined
        shown = set_cell_size(shown, cell_len(text))
    return Segment(shown, style.update_link(None) if style is not None else None)


def console(*, stderr: bool = False, **options: Any) -> Console:
    """Return a console of rich's on stdout or stderr that shows text safely; brackets are text."""
    from rich.console import Console, ConsoleOptions, RenderableType  # 0.2 s: few commands draw

    class SafeConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            return make_safe(super().render(renderable, options))

    stream = sys.stderr if stderr else sys.stdout
    # Rich's own sequences are to be obeyed.
    beneath = stream.beneath if isinstance(stream, _SafeStream) else stream
    return SafeConsole(file=beneath, **{"markup": False, "highlight": False, "emoji": False} | options)


def make_streams_safe() -> None:
    """Let `print` show what a terminal would obey. Text for a pipe or a file is data, and stays."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _SafeStream) and stream.isatty():
            setattr(sys, name, cast(TextIO, _SafeStream(stream)))


class _SafeStream:
    """A text stream to a terminal that shows what the terminal would obey."""

    def __init__(self, beneath: TextIO) -> None:
        self.beneath = beneath

    def write(self, text: str) -> int:
        # Progress bars of libraries start or end with a return, to draw their line anew.
        head, tail = text.startswith("\r"), text.endswith("\r")
        self.beneath.write("\r" * head + visible(text) + "\r" * tail)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.beneath, name)
