"""Names and arguments in a list of tool calls, letter by letter."""

from __future__ import annotations

import json

_SPACE = " \t\r\n"


class CallScanner:
    """Letters of a list of calls → ("name", …) and ("arguments", …), as soon as they are certain.

    It takes what it can use and does not judge JSON: a call ends where its brackets do, and reading
    ends where neither a key nor a value can be.
    """

    def __init__(self) -> None:
        self.lead: list[str] = []  # what stands before the list, in letters, like all that follows
        self.name: str | None = None  # of the call that is open
        self._where = "before"  # before, between, key, colon, value, in value, after value, broken
        self._key = ""
        self._letters: list[str] = []  # of a key or a value
        self._held: list[str] | None = None  # arguments that came before their name
        self._has_arguments = False
        self._depth = 0
        self._in_string = self._escaped = False

    def see(self, letter: str) -> list[tuple[str, str]]:
        """What one more letter makes certain."""
        match self._where:
            case "before" | "between":
                if letter == "{":
                    self.name, self._held, self._has_arguments, self._where = None, None, False, "key"
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
                return self._begin_value(letter) if letter not in _SPACE else []
            case "in value":
                return self._in_value(letter)
            case "after value":
                return self._after_value(letter)
        return []

    def _in_key(self, letter: str) -> list[tuple[str, str]]:
        if not self._letters and letter in _SPACE:
            return []
        if not self._letters and letter == "}":
            return self._after_value(letter)
        self._letters.append(letter)
        if self._letters[0] != '"':
            self._where = "broken"
        elif self._string_ends(letter):
            self._key, self._where = _string("".join(self._letters)) or "", "colon"
        return []

    def _begin_value(self, letter: str) -> list[tuple[str, str]]:
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
            return [*self._end_value(), *self._after_value(letter)]
        else:
            ended = False
        self._letters.append(letter)
        found = self._argument(letter) if self._key == "arguments" else []
        return [*found, *self._end_value()] if ended else found

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
        if self._has_arguments:
            return []  # arguments given a second time are ignored
        if self.name is not None:
            return [("arguments", letter)]
        if self._held is None:
            self._held = []
        self._held.append(letter)
        return []

    def _end_value(self) -> list[tuple[str, str]]:
        self._where = "after value"
        if self._key == "arguments":
            self._has_arguments = self._has_arguments or bool(self._letters)
        elif self._key == "name" and self.name is None and (name := _string("".join(self._letters))):
            self.name = name
            held = [("arguments", "".join(self._held))] if self._held is not None else []
            return [("name", name), *held]
        return []

    def _after_value(self, letter: str) -> list[tuple[str, str]]:
        if letter == ",":
            self._letters, self._where = [], "key"
        elif letter == "}":
            missing = self.name is not None and not self._has_arguments
            self.name, self._where = None, "between"
            return [("arguments", "{}")] if missing else []
        elif letter not in _SPACE:
            self._where = "broken"
        return []


class ObjectScanner:
    """Finds where a JSON object ends, whatever follows it; it does not judge what is inside."""

    def __init__(self) -> None:
        self.is_whole = False
        self._depth = 0
        self._in_string = self._escaped = False

    def see(self, text: str) -> str:
        """The part of a text that is the object's."""
        if self.is_whole:
            return ""
        text = text if self._depth else text.lstrip(_SPACE)
        for n, letter in enumerate(text, 1):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = letter == "\\", letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_whole = True
                    return text[:n]
        return text


def _string(literal: str) -> str | None:
    """The text of a JSON string; None for anything else."""
    try:
        value = json.loads(literal, strict=False)
    except ValueError:
        return None
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None
