"""Tool calls in Mistral's v3 format: [TOOL_CALLS], then a JSON list of {"name": …, "arguments": …}.

Calls are told to the client as they are written: a call's name as soon as it is known, its arguments letter by
letter. A call that the client demands is demanded of the model by a grammar; any other may be malformed: what was
told of it stays told, and where nothing could be told at all the text is an answer like any other.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

MARK = "[TOOL_CALLS]"
_ID = string.ascii_letters + string.digits
_SPACE = " \t\r\n"
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas by names
_VALUES = ("const", "enum", "default", "examples")  # no schemas, whatever they hold


def call_id() -> str:
    """Nine letters and digits, as Mistral's format wants them."""
    return "".join(secrets.choice(_ID) for _ in range(9))


def calls_schema(functions: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """The JSON schema of a list of calls to these functions, at least one. Arguments are always an object.

    Each function's parameters are a definition of their own: what they refer to in themselves is found there.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": {"type": "object", "$ref": f"#/$defs/{i}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, function in enumerate(functions)
    ]
    most = {} if parallel else {"maxItems": 1}
    defs = {str(i): _moved(function["parameters"], i, _address(function)) for i, function in enumerate(functions)}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, "$defs": defs}


def _address(function: Mapping[str, Any]) -> str:
    """What a function's parameters call themselves; nothing, mostly."""
    address = function["parameters"].get("$id")
    return address.rstrip("#") if isinstance(address, str) else ""


def _moved(schema: Any, place: int, address: str) -> Any:
    """A schema whose references to itself hold where it is the definition number `place` of another.

    They are `#`, `#/…` or the name of an anchor, `#…`, and may stand behind its own address.
    """
    if isinstance(schema, list):
        return [_moved(item, place, address) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            moved[key] = {name: _moved(item, place, address) for name, item in value.items()}
        elif key == "$ref" and isinstance(value, str):
            base, _, where = value.partition("#")
            is_own = base in ("", address)
            moved[key] = f"#{_anchor(place, where)}" if is_own else value
        elif key == "$anchor" and isinstance(value, str):
            moved[key] = _anchor(place, value)
        elif key not in ("$id", "$schema"):
            moved[key] = value if key in _VALUES else _moved(value, place, address)
    return moved


def _anchor(place: int, where: str) -> str:
    """… in the schema of all functions, of which two may use the same name."""
    return f"/$defs/{place}{where}" if where[:1] in ("", "/") else f"f{place}.{where}"


class CallReader:
    """Text after [TOOL_CALLS], piece by piece → deltas of calls as OpenAI has them.

    However the text is cut, the deltas joined are the same, and they are `calls`.
    """

    def __init__(self) -> None:
        self._heads: list[dict[str, Any]] = []  # of calls, as far as they have been told
        self._arguments: list[list[str]] = []  # in pieces, call by call
        self._text: list[str] = []
        self._scanner = _Scanner()
        self._told: list[dict[str, Any]] = []

    def add(self, text: str) -> list[dict[str, Any]]:
        """The deltas that `text` makes: names, and pieces of arguments."""
        if not self._heads:
            self._text.append(text)
        self._told = []
        for letter in text:
            for what, value in self._scanner.see(letter):
                self._name(value) if what == "name" else self._argue(value)
        return self._told

    @property
    def has_calls(self) -> bool:
        return bool(self._heads)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """All calls, as far as they have been told."""
        return [
            {**head, "function": head["function"] | {"arguments": "".join(pieces)}}
            for head, pieces in zip(self._heads, self._arguments, strict=True)
        ]

    @property
    def is_open(self) -> bool:
        """Whether a call that was told of has not come to its end."""
        return self._scanner.name is not None

    @property
    def lead(self) -> str:
        """What stands before the list: no call, but text."""
        lead = "".join(self._scanner.lead)
        return lead if lead.strip() else ""

    @property
    def rest(self) -> str:
        """What is no call, if there was none at all: it is shown as it is."""
        return "" if self._heads else "".join(self._text)

    def _name(self, name: str) -> None:
        call = {"id": call_id(), "type": "function", "function": {"name": name, "arguments": ""}}
        self._told.append({"index": len(self._heads), **call, "function": {"name": name, "arguments": ""}})
        self._heads.append(call)
        self._arguments.append([])

    def _argue(self, text: str) -> None:
        index = len(self._heads) - 1
        self._arguments[-1].append(text)
        last = self._told[-1] if self._told else None
        if last is not None and last["index"] == index and "id" not in last:
            last["function"]["arguments"] += text
        else:
            self._told.append({"index": index, "function": {"arguments": text}})


class _Scanner:
    """Letters of a list of calls → ("name", …) and ("arguments", …), as soon as they are certain.

    It takes what it can use and is not a judge of JSON: a call ends where its brackets do; where no key or value can
    be, nothing more is read.
    """

    def __init__(self) -> None:
        self.lead: list[str] = []  # letters, as all that follows: an answer may be long
        self.name: str | None = None  # of the call that is open
        self._where = "before"  # before, between, key, colon, value, in value, after value, broken
        self._key = ""
        self._letters: list[str] = []  # of a key or a value
        self._held: list[str] | None = None  # arguments that came before their name
        self._given = False
        self._depth = 0
        self._in_string = self._escaped = False

    def see(self, letter: str) -> list[tuple[str, str]]:
        match self._where:
            case "before" | "between":
                if letter == "{":
                    self.name, self._held, self._given, self._where = None, None, False, "key"
                    self._letters = []
                elif letter == "[":
                    self._where = "between"
                elif self._where == "before":
                    self.lead.append(letter)
            case "key":
                return self._in_key(letter)
            case "colon":
                if letter not in _SPACE:
                    self._where = "value" if letter == ":" else "broken"
            case "value":
                return self._begin(letter) if letter not in _SPACE else []
            case "in value":
                return self._in_value(letter)
            case "after value":
                return self._after(letter)
        return []

    def _in_key(self, letter: str) -> list[tuple[str, str]]:
        if not self._letters and letter in _SPACE:
            return []
        if not self._letters and letter == "}":
            return self._after(letter)
        self._letters.append(letter)
        if self._letters[0] != '"':
            self._where = "broken"
        elif self._string_ends(letter):
            self._key, self._where = _text("".join(self._letters)) or "", "colon"
        return []

    def _begin(self, letter: str) -> list[tuple[str, str]]:
        self._letters, self._depth, self._in_string, self._escaped = [], 0, False, False
        self._where = "in value"
        return self._in_value(letter)

    def _in_value(self, letter: str) -> list[tuple[str, str]]:
        if self._in_string:
            ended = self._string_ends(letter) and not self._depth
        elif letter == '"' and (self._depth or not self._letters):
            self._in_string, ended = True, False
        elif letter in "{[":
            self._depth, ended = self._depth + 1, False
        elif letter in "}]" and self._depth:
            self._depth -= 1
            ended = not self._depth
        elif not self._depth and letter in _SPACE + ",}]":  # a number or a word has ended before it
            return [*self._end(), *self._after(letter)]
        else:
            ended = False
        self._letters.append(letter)
        found = self._argument(letter) if self._key == "arguments" else []
        return [*found, *self._end()] if ended else found

    def _string_ends(self, letter: str) -> bool:
        """Whether a string that has begun ends with this letter."""
        if not self._in_string:
            self._in_string = True  # its first quotation mark
            return False
        if self._escaped:
            self._escaped = False
        elif letter == "\\":
            self._escaped = True
        elif letter == '"':
            self._in_string = False
            return True
        return False

    def _argument(self, letter: str) -> list[tuple[str, str]]:
        if self._given:
            return []  # a second time
        if self.name is not None:
            return [("arguments", letter)]
        if self._held is None:
            self._held = []
        self._held.append(letter)
        return []

    def _end(self) -> list[tuple[str, str]]:
        """Of a value."""
        self._where = "after value"
        if self._key == "arguments":
            self._given = self._given or bool(self._letters)
        elif self._key == "name" and self.name is None and (name := _text("".join(self._letters))):
            self.name = name
            held = [("arguments", "".join(self._held))] if self._held is not None else []
            return [("name", name), *held]
        return []

    def _after(self, letter: str) -> list[tuple[str, str]]:
        if letter == ",":
            self._letters, self._where = [], "key"
        elif letter == "}":
            missing = self.name is not None and not self._given
            self.name, self._where = None, "between"
            return [("arguments", "{}")] if missing else []
        elif letter not in _SPACE:
            self._where = "broken"
        return []


def _text(literal: str) -> str | None:
    """The text of a JSON string; None for anything else."""
    try:
        value = json.loads(literal, strict=False)
    except ValueError:
        return None
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None
