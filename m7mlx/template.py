"""Chat templates: Jinja from a stranger's model folder, rendered in a sandbox with bounds on work and size."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from m7mlx.errors import ChatFormatError

MAX_STEPS = 2_000_000  # lines of compiled template code; a conversation of 1,000 messages takes about 20,000
MAX_CHARS = 64_000_000  # of any text that a template builds
_PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "format", "wordwrap", "truncate"}


class Part(NamedTuple):
    """A stretch of a rendered conversation: the name of a control token, or text."""

    name: str
    is_control: bool


class Guard:
    """Marks look-alikes of control tokens in what users typed, so that they are still text after rendering.

    A noncharacter that no message contains is put inside each look-alike before rendering; what is found
    whole afterwards was written by the template. The marks are taken out again, so the text is unchanged.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted((n for n in names if n), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self._beginnings = {n[:i] for n in self._names for i in range(1, len(n))}
        self._ends = {n[i:] for n in self._names for i in range(1, len(n))}
        self._longest = max(map(len, self._names), default=0)
        self._mark = ""

    def protect(self, value: Any) -> Any:
        """A copy of messages or tools with every string in it guarded."""
        if not self._mark:
            self._mark = self._unused_mark(json.dumps(value, ensure_ascii=False, default=str))
        if isinstance(value, str):
            return self._guard_text(value)
        if isinstance(value, Mapping):
            return {k: v if k == "role" else self.protect(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(v) for v in value]
        return value

    def _unused_mark(self, text: str) -> str:
        marks = [chr(c) for c in range(0xFDD0, 0xFDF0)]
        mark = next((m for m in marks if m not in text), None)
        if mark is None:
            raise ChatFormatError("a message holds every Unicode noncharacter; remove some")
        return mark

    def _guard_text(self, text: str) -> str:
        guarded = self._control.sub(lambda m: m[0][0] + self._mark + m[0][1:], text)
        # What stands at an edge could be completed by what the template, or the next message, puts beside it.
        lengths = range(1, min(len(guarded), self._longest) + 1)
        starts = any(guarded[:n] in self._ends for n in lengths)
        ends = any(guarded[-n:] in self._beginnings for n in lengths)
        return (self._mark if starts else "") + guarded + (self._mark if ends else "")

    def split(self, rendered: str) -> list[Part]:
        """Cut a rendered conversation at its genuine control tokens."""
        parts, end = [], 0
        for match in self._control.finditer(rendered):
            parts.append(Part(rendered[end : match.start()], False))
            parts.append(Part(match[0], True))
            end = match.end()
        parts.append(Part(rendered[end:], False))
        texts = (Part(p.name.replace(self._mark, ""), False) if self._mark and not p.is_control else p for p in parts)
        return [p for p in texts if p.name]


def render(template: str, context: Mapping[str, Any]) -> str:
    """Render a chat template. Raises ChatFormatError for anything that goes wrong, endless work included."""
    try:
        compiled = _Environment().from_string(template)
        # Compiled code joins with `~` through this name, past every hook of the sandbox.
        compiled.root_render_func.__globals__["str_join"] = lambda parts: _join(map(str, parts))
        with _StepLimit():
            return compiled.render(**context)
    except ChatFormatError:
        raise
    except RecursionError:
        raise ChatFormatError("the model's chat template calls itself without end") from None
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        ArithmeticError,
        LookupError,
    ) as e:
        raise ChatFormatError(f"the model's chat template failed: {e}") from None


class _StepLimit:
    """Counts executed lines: deterministic, and no thread that would have to be stopped."""

    def __enter__(self) -> None:
        self._steps = 0
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ChatFormatError("the model's chat template does not come to an end")
        return self._trace


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's text for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "+", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        self.filters = {k: v for k, v in self.filters.items() if k not in _PADDING} | {
            "tojson": _tojson,
            "replace": _replace,
            "join": lambda value, d="", attribute=None: _join_filter(self, value, d, attribute),
        }

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        return _join(parts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in _PADDING) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [
            len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right) if not isinstance(x, float)
        ]
        if operator in "**" and len(sizes) == 2 and sizes[0] * sizes[1] > MAX_CHARS:
            _raise("a value grows too large")
        if operator == "+" and isinstance(left, str | list | tuple) and sum(sizes) > MAX_CHARS:
            _raise("a value grows too large")
        if operator == "%" and isinstance(left, str):
            _raise("% formatting is not supported")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(text, str) and name == "replace":
            return _replace(text, *args)
        if isinstance(text, str) and name == "join":
            return _join_filter(self, args[0] if args else (), text)
        return super().call(context, obj, *args, **kwargs)


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    if (len(text) + 1) * len(new) > MAX_CHARS:
        _raise("a text grows too long")
    return str(text).replace(old, new, count)


def _join_filter(environment: jinja2.Environment, value: Any, d: str = "", attribute: Any = None) -> str:
    items = [str(environment.getitem(v, attribute) if attribute is not None else v) for v in value]
    _join([*items, " " * min(len(d) * len(items), MAX_CHARS + 1)])
    return d.join(items)


def _join(parts: Iterable[str]) -> str:
    kept, size = [], 0
    for part in parts:
        kept.append(part)
        size += len(part)
        if size > MAX_CHARS:
            _raise("a text grows too long")
    return "".join(kept)


def _raise(message: str) -> NoReturn:
    raise ChatFormatError(f"the model's chat template refuses the conversation: {message}")


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    """As transformers does it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
