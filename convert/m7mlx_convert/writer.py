"""Safetensors files written in one pass: the header first, from a plan, then the tensors as they come."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx

from m7mlx.arrays import raw_bytes
from m7mlx.errors import RunError
from m7mlx.quantization import Quantization
from m7mlx.safetensors import INDEX

MAX_SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {  # MLX's types → safetensors' names
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}


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


def stored_specs(name: str, shape: tuple[int, ...], dtype: mx.Dtype, scheme: Quantization | None) -> list[Spec]:
    """The tensors that one parameter is stored as, in mlx-lm's layout; `dtype` is the weight's or the scales'."""
    if scheme is None:
        return [Spec(name, dtype, shape)]
    rows, columns = shape
    module = name.removesuffix(".weight")
    groups = (rows, columns // scheme.group_size)
    kinds = ("scales", "biases") if scheme.mode == "affine" else ("scales",)
    packed = Spec(name, mx.uint32, (rows, columns * scheme.bits // 32))
    return [packed, *(Spec(f"{module}.{kind}", dtype, groups) for kind in kinds)]


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
        self._file.write(raw_bytes(array))
        self._tensor += 1
        if self._tensor == len(self._shards[self._shard]):
            self._file.close()
            self._file = None
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
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": ends}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text
