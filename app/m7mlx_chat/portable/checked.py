"""Values out of a stranger's JSON: of the type they must have, or an InputError names the place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

from m7mlx.errors import InputError
from m7mlx_chat.store.rows import LATEST, encodable

_DEEPEST = 16  # settings hold numbers, texts, and lists of these


class Record:
    """A JSON object, and what to call it."""

    def __init__(self, value: Any, name: str) -> None:
        self.name = name
        self._values: dict[str, Any] = value if isinstance(value, dict) else self.refuse("is not a JSON object")

    def refuse(self, why: str) -> NoReturn:
        raise InputError(f"{self.name} {why}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """The value as it is; None if there is none."""
        return self._values.get(key)

    def text(self, key: str) -> str:
        return encodable(self._typed(key, str, "a text"))

    def flag(self, key: str) -> bool:
        return bool(self._typed(key, bool, "true or false"))

    def whole(self, key: str) -> int:
        value: int = self._typed(key, int, "a whole number")
        return value if not isinstance(value, bool) else self._wrong(key, "a whole number")

    def array(self, key: str) -> list[Any]:
        return list(self._typed(key, list, "a list"))

    def texts(self, key: str) -> list[str]:
        values = self.array(key)
        return values if all(isinstance(value, str) for value in values) else self._wrong(key, "a list of texts")

    def record(self, key: str) -> Record:
        """An object in this one; an empty one if there is none."""
        return Record(self.get(key) if self.get(key) is not None else {}, f"{key!r} of {self.name}")

    def items(self) -> list[tuple[str, Any]]:
        return list(self._values.items())

    def time(self, key: str) -> float:
        """Seconds since 1970."""
        value = self.get(key)
        right = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LATEST
        return float(value) if right else self._wrong(key, "a time")

    def index(self, key: str, below: int) -> int | None:
        """None, or a number from 0, smaller than `below`."""
        if self.get(key) is None:
            return None
        value = self.whole(key)
        return value if 0 <= value < below else self._wrong(key, "an earlier message")

    def one_of(self, key: str, choices: Sequence[Any]) -> Any:
        value = self.get(key)
        return value if isinstance(value, str) and value in choices else self._wrong(key, f"one of {choices}")

    def values(self, key: str) -> dict[str, Any]:
        """A JSON object of numbers that are finite, nested not too deep to be written again."""
        value = self._typed(key, dict, "a JSON object")
        return dict(value) if _sound(value, _DEEPEST) else self._wrong(key, "a plain JSON object")

    def _typed(self, key: str, kind: type, wanted: str) -> Any:
        value = self.get(key)
        return value if isinstance(value, kind) else self._wrong(key, wanted)

    def _wrong(self, key: str, wanted: str) -> NoReturn:
        self.refuse(f"has a {key!r} that is not {wanted}")


def _sound(value: Any, depth: int) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_sound(one, depth - 1) for one in inside)
    return True
