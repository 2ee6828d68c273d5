"""Chat templates: Jinja from a stranger's model folder, in which typed text must stay text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from m7mlx.errors import ChatFormatError, WorkerDiedError, WorkerMemoryError, WorkerTimeError
from m7mlx.worker import Worker

# What one rendering may take. A turn takes a millisecond, and the work of an honest template grows
# with the conversation only.
_SECONDS, _SECONDS_PER_BYTE = 1.0, 1e-6  # of the processor, compiling included
_PATIENCE = 5.0  # as many times longer by the clock, since others need the processor too
_MEMORY, _MEMORY_PER_BYTE = 64 << 20, 24  # room to hold a text six times, at 4 bytes a character
_TEXT, _TEXT_PER_BYTE = 2_000_000, 8  # characters that may come out: all of them will be tokenised
_MAX_WORDS = 300  # characters of what a template itself says when it refuses
_TEMPLATE = 1_000_000  # characters of a template itself; real ones have a few thousand
_worker = Worker("m7mlx.tokens.template_process", memory=2 << 30)


class Stretch(NamedTuple):
    """A stretch of a rendered conversation: the name of a control token, or text."""

    name: str
    is_control: bool


class Marker:
    """Marks look-alikes of control tokens in what users typed, so that rendering leaves them text.

    A noncharacter that no message contains is put inside each look-alike before rendering; a name
    that is whole afterwards was written by the template. Then the marks are taken out again, so the
    text is unchanged. Names of a single character have no inside: they stay text.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted((n for n in names if len(n) > 1), key=len, reverse=True)
        any_name = "|".join(map(re.escape, self._names)) or r"(?!)"
        self._control = re.compile(any_name)
        self._beginning = re.compile(f"(?={any_name}).", re.DOTALL)  # overlapping ones too
        self._beginnings = {n[:i] for n in self._names for i in range(1, len(n))}
        self._ends = {n[i:] for n in self._names for i in range(1, len(n))}
        self._longest = max(map(len, self._names), default=0)
        self._mark = ""

    def mark(self, value: Any) -> Any:
        """Copy messages and tools with every string marked, names of fields included.

        Only a message's own fields, and its role, stay as they are: templates look for them.
        """
        try:
            if not self._mark:
                self._mark = self._unused_mark(json.dumps(value, ensure_ascii=False, default=str))
            return self._mark_fields(value)
        except (ValueError, RecursionError):
            raise ChatFormatError("a message or a tool is nested too deep for a chat template") from None

    def _mark_fields(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: v if k == "role" else self._marked(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark_fields(v) for v in value]
        return self._marked(value)

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {self._marked(k): self._marked(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(v) for v in value]
        return value

    def _unused_mark(self, text: str) -> str:
        marks = [chr(c) for c in range(0xFDD0, 0xFDF0)]
        mark = next((m for m in marks if m not in text), None)
        if mark is None:
            raise ChatFormatError("a message holds every Unicode noncharacter; remove some")
        return mark

    def _mark_text(self, text: str) -> str:
        marked = self._beginning.sub(lambda m: m[0] + self._mark, text)
        # What stands at an edge could be completed by what the template, or the next message, puts
        # beside it.
        lengths = range(1, min(len(marked), self._longest) + 1)
        starts = any(marked[:n] in self._ends for n in lengths)
        ends = any(marked[-n:] in self._beginnings for n in lengths)
        return (self._mark if starts else "") + marked + (self._mark if ends else "")

    def split(self, rendered: str) -> list[Stretch]:
        """Cut a rendered conversation at its genuine control tokens, and take the marks out."""
        stretches: list[Stretch] = []
        end = 0
        for match in self._control.finditer(rendered):
            stretches.append(Stretch(rendered[end : match.start()], False))
            stretches.append(Stretch(match[0], True))
            end = match.end()
        stretches.append(Stretch(rendered[end:], False))
        if self._mark:
            stretches = [
                one if one.is_control else Stretch(one.name.replace(self._mark, ""), False) for one in stretches
            ]
        return [one for one in stretches if one.name]


def render(template: str, context: Mapping[str, Any]) -> str:
    """Render a chat template in a process of its own.

    Raises ChatFormatError for anything that goes wrong, endless work included.
    """
    if len(template) > _TEMPLATE:
        raise ChatFormatError(f"the model's chat template has more than {_TEMPLATE:,} characters")
    try:
        given = {"template": template, "context": context}
        job = json.dumps(given, ensure_ascii=False, default=_inert).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        raise ChatFormatError("a message or a tool is nested too deep for a chat template") from None
    size = len(job) - len(template)
    cpu = _SECONDS + _SECONDS_PER_BYTE * size
    try:
        answer = _worker.ask(job, cpu * _PATIENCE, cpu, _MEMORY + _MEMORY_PER_BYTE * size)
    except WorkerTimeError:
        raise ChatFormatError("the model's chat template does not come to an end") from None
    except WorkerMemoryError:
        raise ChatFormatError("the model's chat template takes too much memory") from None
    except WorkerDiedError as error:
        raise ChatFormatError(f"the model's chat template cannot be rendered: {_one_line(str(error))}") from None
    found: dict[str, str] = json.loads(answer)
    if "rendered" in found:
        if len(found["rendered"]) > _TEXT + _TEXT_PER_BYTE * size:
            raise ChatFormatError("the model's chat template writes far more than the conversation holds")
        return found["rendered"]
    ((kind, why),) = found.items()
    what = "refuses the conversation" if kind == "refused" else "failed"
    raise ChatFormatError(f"the model's chat template {what}: {_one_line(why) or 'it does not say why'}")


def _inert(value: Any) -> str:
    """Stand in for a value that JSON has no form for."""
    return f"<{type(value).__name__}>"


def _one_line(text: str) -> str:
    """Shorten a stranger's words to one line that cannot steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:_MAX_WORDS]).split())
