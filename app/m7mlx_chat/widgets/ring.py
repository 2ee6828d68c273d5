"""The picture of the paper: what of a conversation the model can see, and where that lies.

Position i lies in slot i mod capacity. The last `window` positions are seen; a few more slots are
slack, so that tokens can be taken back. Beyond lies what has been overwritten: no single token sees
it any more. A model may have layers that roll beside others that see everything.
"""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.color import Color
from textual.widgets import Static

from m7mlx.units import counted, in_bytes, in_gigabytes
from m7mlx_chat.events import OnDisk, Ready, Seen

_EMPTY = "░"


def gauge(ready: Ready | None, seen: Seen, width: int = 12) -> Text:
    """The gauge in one line: how full, how much beyond, how much memory."""
    text = Text()
    if ready is None:
        return text
    limit = ready.window or ready.context
    filled = min(width, round(width * seen.tokens / limit))
    text.append("window " if ready.window else "context ")
    text.append("▰" * filled + "▱" * (width - filled))
    text.append(f" {min(seen.tokens, limit):,}/{limit:,}")
    if ready.window and seen.tokens > ready.window:
        text.append(f" · {seen.tokens - ready.window:,} beyond")
    if seen.cache_bytes:
        text.append(f" · {seen.cache_bytes / 1e6:,.0f} MB")
    return text


def ages(tokens: int, capacity: int, cells: int) -> list[float | None]:
    """How old the newest token in each of `cells` equal parts of the ring is, counted in tokens.

    None stands for a part with nothing in it.
    """
    found: list[float | None] = []
    for cell in range(cells):
        first, last = cell * capacity // cells, max(cell * capacity // cells, (cell + 1) * capacity // cells - 1)
        head = (tokens - 1) % capacity
        if tokens == 0 or (tokens <= capacity and first > head):
            found.append(None)
        else:
            newest = head if first <= head <= last else last
            found.append(float((head - newest) % capacity))
    return found


def copies_line(on_disk: OnDisk) -> str:
    """Say in a line what lies on the disk."""
    what, size = counted(on_disk.conversations, "conversation"), in_bytes(on_disk.nbytes)
    return f"on the disk: {what}, {size} of {on_disk.most_bytes / 1e9:g} GB, to go on at once when opened again"


class RingPicture(Static):
    """The gauge, drawn large."""

    DEFAULT_CSS = """
    RingPicture {
        height: auto; padding: 0 2; background: $panel; border-bottom: hkey $primary 30%; display: none;
        text-wrap: nowrap; text-overflow: ellipsis;
    }
    RingPicture.-shown { display: block; }
    """

    def show(self, ready: Ready | None, seen: Seen, on_disk: OnDisk | None = None) -> None:
        """Draw the gauge as it is now."""
        if self.has_class("-shown"):
            drawn = self._drawn(ready, seen)
            if on_disk is not None:
                drawn.append(f"\n{copies_line(on_disk)}", style="dim")
            self.update(drawn)

    def _drawn(self, ready: Ready | None, seen: Seen) -> Text:
        if ready is None:
            return Text("no model is loaded", style="dim")
        width = max(20, self.size.width or self.app.size.width - 4)
        colors = self.app.theme_variables
        new, old = (
            Color.parse(colors["primary"]),
            Color.parse(colors["panel"]).blend(Color.parse(colors["primary"]), 0.3),
        )
        if ready.window is None or ready.capacity is None:
            return _growing(ready, seen, width, new, old)
        return _rolling(ready, seen, ready.window, ready.capacity, width, new, old)


def _rolling(ready: Ready, seen: Seen, window: int, capacity: int, width: int, new: Color, old: Color) -> Text:
    kept = f" · first {counted(ready.sinks, 'token')} kept" if ready.sinks else ""
    text = _buffer(seen, window, capacity, width, new, old, kept)
    slot = seen.tokens % capacity
    label = f"▲ token {seen.tokens:,} goes to slot {slot:,}"
    at = slot * width // capacity
    if at + len(label) > width:
        label = f"token {seen.tokens:,} goes to slot {slot:,} ▲"
        at = max(0, at - len(label) + 1)
    text.append(" " * at + label + "\n", style="dim")
    text.append_text(_timeline(seen.tokens, window, width, new, old))
    text.append("\n")
    if ready.sliding:
        text.append_text(_buffer(seen, *ready.sliding, width, new, old, " in the other layers"))
    text.append(f"{seen.cache_bytes / 1e6:,.1f} MB", style="bold")
    fixed = seen.tokens > max(capacity, ready.sliding[1] if ready.sliding else 0)
    text.append(
        " of keys and values, " + ("and it stays at that" if fixed else "growing until the buffer turns"), style="dim"
    )
    if fixed and ready.token_bytes:
        text.append(f" · without a window {seen.tokens * ready.token_bytes / 1e6:,.0f} MB", style="dim")
    if seen.kept_bytes:
        text.append(f" · {seen.kept_bytes / 1e6:,.0f} MB for other branches", style="dim")
    return text


def _buffer(seen: Seen, window: int, capacity: int, width: int, new: Color, old: Color, note: str = "") -> Text:
    """What lies in a rolling buffer: a line about it, and its slots."""
    text = Text(no_wrap=True)
    text.append("rolling buffer", style="bold")
    text.append(f"   {counted(capacity, 'slot')} · turned {seen.tokens / capacity:.2f} times{note}\n", style="dim")
    for age in ages(seen.tokens, capacity, width):
        if age is None:
            text.append(_EMPTY, style="dim")
        elif age >= window:
            # slack: not seen any more, but still there to go back to
            text.append("▒", style=_style(old))
        else:
            text.append("█", style=_style(new.blend(old, age / window)))
    return text.append("\n")


def _timeline(tokens: int, window: int, width: int, new: Color, old: Color) -> Text:
    """The conversation from its first token to its last: beyond the window, and in it."""
    beyond = max(0, tokens - window)
    text = Text(no_wrap=True)
    if not beyond:
        return text.append(
            f"{counted(tokens, 'token')} so far, all of it seen; the window holds {window:,}", style="dim"
        )
    seen_label, beyond_label = f" {window:,} seen ", f" {beyond:,} beyond the window "
    right = min(max(round(width * window / tokens), len(seen_label) + 4), width - len(beyond_label) - 4)
    left = width - right
    text.append(beyond_label.center(left, "┄") if left > 0 else "", style="dim")
    for i, character in enumerate(seen_label.center(right, "━")):
        text.append(character, style=_style(old.blend(new, (i + 1) / right)) if character == "━" else "bold")
    return text


def _growing(ready: Ready, seen: Seen, width: int, new: Color, old: Color) -> Text:
    text = Text(no_wrap=True)
    text.append("full attention", style="bold")
    where = " in a part of the layers" if ready.sliding else ""
    text.append(f"   every token is seen{where}: {seen.tokens:,} of {ready.context:,}\n", style="dim")
    filled = min(width, round(width * seen.tokens / ready.context))
    text.append("█" * filled, style=_style(new))
    text.append(_EMPTY * (width - filled) + "\n", style="dim")
    if ready.sliding:
        text.append_text(_buffer(seen, *ready.sliding, width, new, old, " in the others"))
    text.append(f"{seen.cache_bytes / 1e6:,.1f} MB", style="bold")
    whole = ready.most_bytes or ready.context * ready.token_bytes
    text.append(f" of keys and values, growing to {in_gigabytes(whole)}", style="dim")
    text.append(" · --max-kv-size bounds it" if whole > 5e8 else "", style="dim")
    if seen.kept_bytes:
        text.append(f" · {seen.kept_bytes / 1e6:,.0f} MB for other branches", style="dim")
    return text


def _style(color: Color) -> Style:
    return Style(color=color.rich_color)
