"""What is wrong with a body, in words that name the field and say what it must be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

_TOLD = 5  # mistakes at most
_MOST = 300  # characters of each
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_KINDS = {"str", "int", "float", "bool", "dict", "constrained-str", "constrained-int", "constrained-float"}
# What the validator calls a mistake → what must be, with the validator's numbers.
_WORDS = {
    "missing": "is missing",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number that is not so large",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "string_too_long": "must have at most {max_length:,} characters",
    "string_too_short": "must not be empty",
    "too_long": "must have at most {max_length:,} items",
    "too_short": "must have at least {min_length} item",
    "none_required": "must be null or left out",
}
_PATTERNS = {"^[0-9]{1,9}$": "must be the id of a token, in digits"}


def describe(error: ValidationError) -> str:
    """The first mistakes, each with where it is and what should be there."""
    mistakes: dict[tuple[str, ...], list[str]] = {}
    for one in error.errors(include_url=False, include_input=False)[: 4 * _TOLD]:
        words = mistakes.setdefault(_place(one["loc"]), [])
        if (told := _words(one)) not in words:
            words.append(told)
    # Of several forms that a field may have, the one that came furthest is the one that was meant.
    places = [
        place for place in mistakes if not any(other[: len(place)] == place and other != place for other in mistakes)
    ]
    return "; ".join(_sentence(place, mistakes[place])[:_MOST] for place in places[:_TOLD])


def _place(loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """Where a mistake is, without the validator's names of forms that a field may have."""
    return tuple(
        str(part)
        for part in loc
        if isinstance(part, int) or (_FIELD.fullmatch(part) and part not in _KINDS and not part[:1].isupper())
    )


def _words(one: Mapping[str, Any]) -> str:
    kind, context = one["type"], one.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], "must be 1 to 64 letters, digits, dots, dashes or underscores")
    return _WORDS[kind].format_map(context) if kind in _WORDS else "cannot be read"


def _sentence(place: tuple[str, ...], words: list[str]) -> str:
    where = ".".join(place)
    first, *others = words
    told = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
    is_own = not where or (len(place) == 1 and told.startswith(f"{where}:"))
    return told if is_own else f"{where}: {told}"
