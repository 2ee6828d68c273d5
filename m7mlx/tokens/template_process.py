"""Chat templates as transformers renders them: the same sandbox, filters, functions and tags.

`m7mlx.tokens.template` runs this in a process of its own, whose limits bound what a template takes;
the sandbox keeps it from reaching anything else there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MAX_BITS = 256  # of a power: templates count messages


class _Refusal(jinja2.TemplateError):
    """The template itself refuses the conversation (`raise_exception`)."""


def handler(setup: bytes) -> Callable[[bytes], bytes]:
    """Return a function that renders {"template": …, "context": …}.

    It answers {"rendered": …}, {"refused": why} or {"failed": why}.
    """
    return lambda job: json.dumps(_answer(job), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _answer(job: bytes) -> dict[str, str]:
    try:
        given = json.loads(job)
        return {"rendered": _compiled(given["template"]).render(given["context"])}
    except MemoryError:
        raise
    except _Refusal as error:
        return {"refused": _words(error)}
    except Exception as error:
        return {"failed": _words(error)}


def _words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        text = "it calls itself without end, or is nested too deep"
    elif isinstance(error, jinja2.TemplateSyntaxError):
        text = f"line {error.lineno}: {error.message}"
    elif isinstance(error, KeyError):
        text = f"there is no {error}"
    else:
        said = [part for part in error.args if isinstance(part, str)]
        text = said[-1] if said else type(error).__name__
    return text[:2000]


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _Environment().from_string(template)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: marks text for training; no effect here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict`, without the attributes of a type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace`, without attributes that Python itself would look at."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no {name}")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"**"})  # see `call_binop`; not folded at compile time

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_BITS:
            raise OverflowError("a number grows too large")
        return super().call_binop(context, operator, left, right)


def raise_exception(message: Any) -> NoReturn:
    raise _Refusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without the escapes of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
