"""Safetensors files written in one pass: the header first, from a plan, then the tensors as they come.

Beside them grows a journal: after each parameter, how far its file is and the SHA-256 of all its bytes so far. A
run that was killed is taken up after the last parameter whose bytes are those of the journal.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx

from m7mlx.arrays import raw_bytes
from m7mlx.errors import RunError, WeightsError
from m7mlx.files.checksums import MANIFEST, sha256
from m7mlx.files.disk import sync
from m7mlx.files.weights import DTYPES, INDEX, validate_header
from m7mlx.quantization import Quantization

MAX_SHARD_BYTES = 5 * 10**9
JOURNAL = ".journal"
_SYNC_EVERY = 1 << 28  # bytes
_PIECE = 1 << 22
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    packed = Spec(name, mx.uint32, (rows, columns * scheme.bits // 32))
    if scheme.mode == "affine":
        return [packed, Spec(f"{module}.scales", dtype, groups), Spec(f"{module}.biases", dtype, groups)]
    return [packed, Spec(f"{module}.scales", mx.uint8, groups)]


class Piece(NamedTuple):
    """One tensor's bytes, on their way to a file."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of(cls, array: mx.array) -> Piece:
        """Evaluates `array`."""
        return cls(array.dtype, array.shape, raw_bytes(array))


class ShardWriter:
    """Writes parameters in the order of `plan` into as few files of at most `max_bytes` as they fill.

    plan  the tensors of each parameter; a parameter is never split over two files
    key   what the plan is known by; a journal with the same key in `folder` is taken up
    done  parameters that were found whole there
    """

    def __init__(
        self,
        folder: Path,
        plan: Sequence[Sequence[Spec]],
        key: str | None = None,
        max_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self._folder = folder
        self._shards = _split(plan, max_bytes)
        self._names = _shard_names(len(self._shards))
        self._headers = [_header([spec for group in shard for spec in group]) for shard in self._shards]
        self._shard, self._group = 0, 0  # the next to be written
        self._digest = hashlib.sha256()  # of the open file so far
        self._checksums: dict[str, str] = {}
        self._file: BinaryIO | None = None
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flush: Future[None] | None = None
        self._unflushed = 0
        before = self._read_journal(key)
        self._journal = (folder / JOURNAL).open("w")
        self._note(key or "")
        if before:
            self._resume(before)
        self.done = sum(len(shard) for shard in self._shards[: self._shard]) + self._group

    def write(self, pieces: Sequence[Piece]) -> None:
        """Write the next parameter of the plan."""
        specs = self._shards[self._shard][self._group] if self._shard < len(self._shards) else []
        if [(piece.dtype, piece.shape) for piece in pieces] != [(spec.dtype, spec.shape) for spec in specs]:
            raise RunError(f"{[piece[:2] for piece in pieces]} came where {list(specs)} was planned")
        if self._file is None:
            self._file = (self._folder / self._names[self._shard]).open("wb")
            self._digest = hashlib.sha256()
            self._put(memoryview(self._headers[self._shard]))
        for piece in pieces:
            self._put(piece.data)
        self._file.flush()
        self._group += 1
        self._note(self._entry())
        if self._group == len(self._shards[self._shard]):
            self._next_shard()

    def finish(self, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Read every file again, write their checksums, and the index where there is more than one file.

        `progress` is called with each count of bytes read. Raises RunError if tensors are missing, WeightsError if
        the disk holds other bytes than were written.
        """
        if self._shard < len(self._shards):
            raise RunError(f"{self._shards[self._shard][self._group][0].name} was planned but not written")
        for name, header, shard in zip(self._names, self._headers, self._shards, strict=True):
            path = self._folder / name
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while data := file.read(_PIECE):
                    digest.update(data)
                    progress(len(data))
            found = validate_header(path)
            planned = {spec.name: (DTYPE_NAMES[spec.dtype], spec.shape) for group in shard for spec in group}
            if digest.hexdigest() != self._checksums[name] or found != planned or not header:
                raise _damaged(path)
        lines = [f"{checksum}  {name}\n" for name, checksum in self._checksums.items()]
        self._write_text(MANIFEST, "".join(lines))
        if len(self._shards) > 1:
            self._write_text(INDEX, self._index())
        (self._folder / JOURNAL).unlink()

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are written, headers included."""
        return sum((self._folder / name).stat().st_size for name in self._names[: self._shard])

    def close(self) -> None:
        """Close the files that are open, if any."""
        self._flusher.shutdown()
        self._journal.close()
        if self._file is not None:
            self._file.close()

    def _put(self, data: memoryview) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)
        self._unflushed += len(data)
        if self._unflushed > _SYNC_EVERY and (self._flush is None or self._flush.done()):
            # The disk writes while the next tensors are computed; all at the end it would take its time then.
            self._unflushed = 0
            self._flush = self._flusher.submit(sync, self._file.fileno())

    def _next_shard(self) -> None:
        if self._file is not None:
            if self._flush is not None:
                self._flush.result()
            self._file.close()
            self._file, self._flush = None, None
        self._checksums[self._names[self._shard]] = self._digest.hexdigest()
        self._shard, self._group = self._shard + 1, 0

    def _write_text(self, name: str, text: str) -> None:
        path = self._folder / name
        path.write_bytes(text.encode())
        check_written(path, hashlib.sha256(text.encode()).hexdigest())

    def _index(self) -> str:
        index = {
            "metadata": {"total_size": sum(s.nbytes for shard in self._shards for group in shard for s in group)},
            "weight_map": {
                spec.name: file
                for file, shard in zip(self._names, self._shards, strict=True)
                for group in shard
                for spec in group
            },
        }
        return json.dumps(index, indent=2) + "\n"

    # --- the journal --------------------------------------------------------------------------------------

    def _note(self, line: str) -> None:
        self._journal.write(line + "\n")
        self._journal.flush()

    def _entry(self) -> str:
        return f"{self._shard} {self._group} {self._digest.hexdigest()}"

    def _read_journal(self, key: str | None) -> set[str]:
        try:
            found, *entries = (self._folder / JOURNAL).read_text().splitlines()
        except (OSError, ValueError):
            return set()
        return set(entries) if key and found == key else set()

    def _resume(self, before: set[str]) -> None:
        """Go to the end of what an earlier run wrote and its journal vouches for."""
        while self._shard < len(self._shards):
            path = self._folder / self._names[self._shard]
            if not path.is_file():
                return
            with path.open("rb") as file:
                end = self._resume_file(file, before)
            if self._group < len(self._shards[self._shard]):
                if end:
                    self._file = path.open("r+b")
                    self._file.truncate(end)
                    self._file.seek(end)
                return
            self._next_shard()

    def _resume_file(self, file: BinaryIO, before: set[str]) -> int:
        """The bytes of one file that can stay; `_group` and `_digest` are set to what follows them."""
        header = self._headers[self._shard]
        if file.read(len(header)) != header:
            return 0
        end = len(header)
        digest = hashlib.sha256(header)
        for group in self._shards[self._shard]:
            nbytes = sum(spec.nbytes for spec in group)
            ahead = digest.copy()
            for start in range(0, nbytes, _PIECE):
                ahead.update(file.read(min(_PIECE, nbytes - start)))
            if f"{self._shard} {self._group + 1} {ahead.hexdigest()}" not in before:
                break
            digest, end, self._group = ahead, end + nbytes, self._group + 1
            self._digest = digest.copy()
            self._note(self._entry())
        return end if self._group else 0


def check_written(path: Path, checksum: str) -> None:
    """Read a file again. Raises WeightsError if the disk holds other bytes than were written."""
    if sha256(path) != checksum:
        raise _damaged(path)


def _damaged(path: Path) -> WeightsError:
    return WeightsError(f"{path.name} is not on the disk as it was written; check the disk")


def _split(plan: Sequence[Sequence[Spec]], max_bytes: int) -> list[list[Sequence[Spec]]]:
    shards: list[list[Sequence[Spec]]] = [[]]
    size = 0
    for group in plan:
        nbytes = sum(spec.nbytes for spec in group)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += nbytes
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
