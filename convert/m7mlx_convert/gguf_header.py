"""A GGUF file's header: its metadata and where its tensors lie (llama.cpp, `docs/gguf.md`).

Every count, length and offset is checked against the file before anything is read for it, and what
is read takes memory in proportion to the file. `GGUFReader` of the `gguf` package trusts the
counts, and keeps an array object of some hundred bytes for each byte of a metadata array.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from m7mlx.errors import WeightsError

_SCALARS = {  # by value type
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32  # unless general.alignment says otherwise
_MAX_ENTRIES, _MAX_TENSORS, _MAX_NAME, _MAX_STRING, _MAX_ITEMS = 10_000, 100_000, 65_535, 2**24, 4_000_000


class GGUFTensor(NamedTuple):
    """A tensor in the file.

    kind            ggml's name of its type
    shape           rows first
    offset, nbytes  where it lies in the file
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> np.ndarray:
        """Read the stored bytes, uint8 [rows, bytes of a row]."""
        data = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.offset)
        if data.size != self.nbytes:
            raise WeightsError(f"{self.path} became shorter while it was read; fetch it again")
        return data.reshape(math.prod(self.shape[:-1]), -1)


class GGUFHeader(NamedTuple):
    """All that stands in a file before its tensors' data."""

    metadata: dict[str, Any]  # key → number, string, bool or a flat list of them
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Read the header. Raises WeightsError unless it is whole, and points within the file."""
    try:
        with path.open("rb") as file:
            return _read(path, _Cursor(file, path.stat().st_size))
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} is not a sound GGUF file: {error}; fetch it again") from None


class _Cursor:
    """Reads forward through the file, never past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size, self.at = size, 0

    def take(self, count: int) -> bytes:
        """Read so many bytes."""
        if count > self.size - self.at:
            raise ValueError("it ends too early")
        self.at += count
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError("it ends too early")
        return data

    def number(self, form: str) -> Any:
        """Read one number; `form` as `struct` has it."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def bounded(self, form: str, limit: int, what: str) -> int:
        """Read a count or length of at most `limit`."""
        value: int = self.number(form)
        if value > limit:
            raise ValueError(f"{what} of {value} is too large")
        return value

    def string(self, limit: int, what: str) -> str:
        """Read a text of at most `limit` bytes."""
        return self.take(self.bounded("Q", limit, what)).decode("utf-8")

    def value(self, kind: int) -> Any:
        """Read a metadata value of this type."""
        if kind == _STRING:
            return self.string(_MAX_STRING, "a string")
        if kind == _ARRAY:
            item, count = self.number("I"), self.bounded("Q", _MAX_ITEMS, "an array")
            if item == _STRING:
                return [self.value(item) for _ in range(count)]
            if item not in _SCALARS:
                raise ValueError(f"an array of value type {item} is not supported")
            form = f"<{count}{_SCALARS[item]}"
            return list(struct.unpack(form, self.take(struct.calcsize(form))))
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind} is unknown")
        return self.number(_SCALARS[kind])


def _read(path: Path, cursor: _Cursor) -> GGUFHeader:
    """Read the header. Raises ValueError for what is not sound in it."""
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    if (version := cursor.number("I")) not in (2, 3):
        raise ValueError(f"version {version} is not supported (2 and 3, little-endian, are)")
    n_tensors = cursor.bounded("Q", _MAX_TENSORS, "a number of tensors")
    n_entries = cursor.bounded("Q", _MAX_ENTRIES, "a number of metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(n_entries):
        key = cursor.string(_MAX_NAME, "a key")
        if key in metadata:
            raise ValueError(f"the key {key[:80]!r} stands twice in it")
        metadata[key] = cursor.value(cursor.number("I"))
    entries = [_tensor_entry(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment!r} is no power of two")
    data = cursor.at + -cursor.at % alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, kind, shape, offset in entries:
        kind_name, nbytes = _stored(name, kind, shape)
        if name in tensors:
            raise ValueError(f"tensor {name[:80]!r} stands twice in it")
        if data + offset + nbytes > cursor.size:
            raise ValueError(f"tensor {name[:80]!r} lies outside the file")
        tensors[name] = GGUFTensor(path, kind_name, shape, data + offset, nbytes)
    return GGUFHeader(metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Read (name, type, shape, offset); the file has the last dimension first."""
    name = cursor.string(_MAX_NAME, "a name")
    n_dims = cursor.bounded("I", 4, "a number of dimensions")
    shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]
    return name, cursor.number("I"), shape, cursor.number("Q")


def _stored(name: str, kind: int, shape: tuple[int, ...]) -> tuple[str, int]:
    """Return ggml's name of a type, and the bytes of a tensor of it."""
    # Slow to import, and not needed to refuse what is no GGUF file.
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        ggml = GGMLQuantizationType(kind)
        block, nbytes = GGML_QUANT_SIZES[ggml]
    except (ValueError, KeyError):
        raise ValueError(f"the type {kind} of tensor {name[:80]!r} is unknown") from None
    if not shape or 0 in shape or shape[-1] % block:
        raise ValueError(f"tensor {name[:80]!r} of type {ggml.name} cannot have the shape {list(shape)}")
    return ggml.name, math.prod(shape) // block * nbytes
