"""A look over a GGUF header before the `gguf` package reads it: every count, length and offset within the file.

The package trusts what it reads: a count of 2⁵⁰ would fill the memory. Layout: llama.cpp's `docs/gguf.md`.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from m7mlx.errors import WeightsError

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type → bytes
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES, _MAX_TENSORS, _MAX_NAME, _MAX_ITEMS = 10_000, 100_000, 65_535, 10_000_000


class _Cursor:
    """Reads forward through the file, never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def skip(self, count: int) -> None:
        if count > len(self._data) - self.at:
            raise ValueError("it ends too early")
        self.at += count

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form))
        value: int = struct.unpack_from(form, self._data, start)[0]
        return value

    def bounded(self, form: str, limit: int, what: str) -> int:
        value = self.number(form)
        if value > limit:
            raise ValueError(f"{what} of {value} is too large")
        return value

    def value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self.skip(self.number("<Q"))
        elif kind == _ARRAY:
            item = self.number("<I")
            count = self.bounded("<Q", _MAX_ITEMS, "an array")
            if item in _SCALARS:
                self.skip(count * _SCALARS[item])
            elif depth:
                raise ValueError("arrays are nested too deep")
            else:
                for _ in range(count):
                    self.value(item, depth + 1)
        elif kind in _SCALARS:
            self.skip(_SCALARS[kind])
        else:
            raise ValueError(f"value type {kind} is unknown")


def check_header(path: Path) -> None:
    """Raise WeightsError unless the header is whole and all that it points to lies within the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(_Cursor(data), data, len(data))
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} is not a sound GGUF file: {error}; fetch it again") from None


def _check(cursor: _Cursor, data: mmap.mmap, size: int) -> None:
    if data[:4] != b"GGUF":
        raise ValueError("it does not start with GGUF")
    cursor.skip(4)
    if (version := cursor.number("<I")) not in (2, 3):
        raise ValueError(f"version {version} is not supported (2 and 3 are)")
    tensors = cursor.bounded("<Q", _MAX_TENSORS, "a number of tensors")
    entries = cursor.bounded("<Q", _MAX_ENTRIES, "a number of metadata entries")
    for _ in range(entries):
        cursor.skip(cursor.bounded("<Q", _MAX_NAME, "a key"))
        cursor.value(cursor.number("<I"))
    for _ in range(tensors):
        cursor.skip(cursor.bounded("<Q", _MAX_NAME, "a name"))
        elements = 1
        for _ in range(cursor.bounded("<I", 4, "a number of dimensions")):
            elements *= cursor.number("<Q")
        kind, offset = cursor.number("<I"), cursor.number("<Q")
        if offset + _nbytes(kind, elements) > size:
            raise ValueError("a tensor lies outside the file")


def _nbytes(kind: int, elements: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise ValueError(f"tensor type {kind} is unknown") from None
    return elements // block * nbytes
