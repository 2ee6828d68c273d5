"""Safetensors files written in one pass: the header first, from a plan, then the tensors as they come."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np

from m7mlx.errors import RunError
from m7mlx.safetensors import INDEX

MAX_SHARD_BYTES = 5 * 10**9
_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}


class Spec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = self.dtype.size
        for side in self.shape:
            size *= side
        return size


class ShardWriter:
    """Writes the tensors of `plan`, in that order, into as few files of at most `max_bytes` as they fill."""

    def __init__(self, folder: Path, plan: Sequence[Spec], max_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._shards = _split(plan, max_bytes)
        self._names = _shard_names(len(self._shards))
        self._shard, self._tensor = 0, 0
        self._file: BinaryIO | None = None

    def write(self, name: str, array: mx.array) -> None:
        """Write the next tensor of the plan."""
        spec = self._shards[self._shard][self._tensor]
        if (name, array.dtype, array.shape) != spec:
            raise RunError(f"{name} {array.dtype} {list(array.shape)} came where {spec} was planned")
        if self._file is None:
            self._file = (self._folder / self._names[self._shard]).open("wb")
            self._file.write(_header(self._shards[self._shard]))
        self._file.write(_raw(array))
        self._tensor += 1
        if self._tensor == len(self._shards[self._shard]):
            self._close_shard()
            self._shard, self._tensor = self._shard + 1, 0

    def finish(self) -> None:
        """Write the index, where there is more than one file. Raises RunError if tensors are missing."""
        if self._shard < len(self._shards):
            raise RunError(f"{self._shards[self._shard][self._tensor].name} was planned but not written")
        if len(self._shards) > 1:
            pairs = zip(self._names, self._shards, strict=True)
            index = {
                "metadata": {"total_size": sum(s.nbytes for shard in self._shards for s in shard)},
                "weight_map": {spec.name: file for file, shard in pairs for spec in shard},
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        """Close the file that is open, if any; for a run that was broken off."""
        if self._file is not None:
            self._file.close()

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None


def _split(plan: Sequence[Spec], max_bytes: int) -> list[list[Spec]]:
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in plan:
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _header(specs: Sequence[Spec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for spec in specs:
        ends = [offset, offset + spec.nbytes]
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": ends}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text


def _raw(array: mx.array) -> memoryview:
    """The bytes of an array, little-endian and row by row, without a copy where it lies so already."""
    array = mx.contiguous(array)
    if array.dtype == mx.bfloat16:  # NumPy has no such type
        array = array.view(mx.uint16)
    return np.array(array, copy=False).reshape(-1).view(np.uint8).data
