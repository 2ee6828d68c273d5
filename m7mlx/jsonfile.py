"""Files of settings that come with a model: read within bounds, their values checked."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from m7mlx.errors import ConfigError

_MOST = 16 << 20  # bytes of a file of settings; some list a vocabulary
_KINDS: dict[str, tuple[type, ...]] = {"an object": (dict,), "a list": (list,), "a text": (str,)}


class NotRegularError(OSError):
    """A path that leads to no regular file: a folder, a pipe, a device."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read it; a pipe that nobody writes to keeps nobody waiting.

    Raises OSError; NotRegularError for anything else.
    """
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115  the caller closes it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise NotRegularError(f"{path} is no regular file")


def read_bytes(path: Path, most: int) -> bytes:
    """Read a regular file of at most so many bytes. Raises ConfigError, which names it."""
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
    except NotRegularError as error:
        raise ConfigError(str(error)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > most:
        raise ConfigError(f"{path} has more than {most / 1e6:.0f} MB, which no file of its kind has")
    return data


def read_json(path: Path, most: int = _MOST) -> dict[str, Any]:
    """Read a JSON object. Raises ConfigError, which names the file."""
    try:
        data = json.loads(read_bytes(path, most).decode("utf-8"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error) or type(error).__name__}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return data


def said(value: object) -> str:
    """Return a value out of a stranger's file as text, short enough for a message."""
    text = repr(value) if not isinstance(value, dict | list) else json.dumps(value)[:60]
    return text if len(text) <= 60 else text[:59] + "…"


def short(text: str) -> str:
    """Return a name out of a stranger's file, short enough for a message."""
    return text if len(text) <= 120 else text[:119] + "…"


def given(data: Mapping[str, Any], field: str, kind: str) -> Any:
    """Return the value of a field; None where it is absent or null.

    kind  what it must be: "an object", "a list" or "a text"

    Raises ConfigError, which names the field.
    """
    value = data.get(field)
    if value is not None and not isinstance(value, _KINDS[kind]):
        raise ConfigError(f"{field} must be {kind}, not {said(value)}")
    return value


def texts(data: Mapping[str, Any], field: str) -> list[str]:
    """Return the value of a field that must be a list of texts; empty where absent or null."""
    value = given(data, field, "a list") or []
    if not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{field} must be a list of texts, not {said(value)}")
    return list(value)


def number(value: Any, field: str) -> float:
    """Check a number that must be above 0 and finite. Raises ConfigError, which names the field."""
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and 0 < float(value) < float("inf"):
            return value
    except OverflowError:
        pass
    raise ConfigError(f"{field} must be a number above 0, not {said(value)}")


def whole(value: Any, field: str, most: int = 1 << 40) -> int:
    """Check a whole number that must be above 0. Raises ConfigError, which names the field."""
    if type(value) is not int or not 0 < value <= most:
        above = f" and at most {most:,}" if type(value) is int and value > most else ""
        raise ConfigError(f"{field} must be a whole number above 0{above}, not {said(value)}")
    return value


def token_id(value: Any, field: str) -> int:
    """Check an id of a vocabulary. Raises ConfigError, which names the field."""
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ConfigError(f"{field} must be an id, not {said(value)}")
    return value


def token_ids(value: Any, field: str) -> tuple[int, ...]:
    """Return an id, or a list of ids, as a tuple; empty where it is null."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(token_id(i, field) for i in ids)
