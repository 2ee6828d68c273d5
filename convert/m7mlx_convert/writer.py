"""Safetensors files written in one pass: a planned header, then the tensors as they come.

Beside them grows a journal: after each parameter, how far its file is and the SHA-256 of all its
bytes so far. A run that was killed is resumed after the last parameter whose bytes are those of the
journal.
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

MAX_FILE_BYTES = 5 * 10**9
JOURNAL = ".journal"
_SYNC_EVERY = 1 << 28  # bytes
_BLOCK = 1 << 22
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        size = self.dtype.size
        for side in self.shape:
            size *= side
        return size


def stored_specs(name: str, shape: tuple[int, ...], dtype: mx.Dtype, scheme: Quantization | None) -> list[Spec]:
    """Return the tensors that one parameter is stored as, in mlx-lm's layout.

    dtype  of the weight, or of its scales
    """
    if scheme is None:
        return [Spec(name, dtype, shape)]
    rows, columns = shape
    module = name.removesuffix(".weight")
    groups = (rows, columns // scheme.group_size)
    packed = Spec(name, mx.uint32, (rows, columns * scheme.bits // 32))
    if scheme.mode == "affine":
        return [packed, Spec(f"{module}.scales", dtype, groups), Spec(f"{module}.biases", dtype, groups)]
    return [packed, Spec(f"{module}.scales", mx.uint8, groups)]


class TensorBytes(NamedTuple):
    """One tensor's bytes, on their way to a file."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of(cls, array: mx.array) -> TensorBytes:
        """Evaluate `array`."""
        return cls(array.dtype, array.shape, raw_bytes(array))


class WeightsWriter:
    """Writes parameters in their order into as few files of at most `max_bytes` as they fill.

    parameters  the tensors of each; a parameter is never split over two files
    key         the plan's; a journal with the same key in `folder` is resumed
    done        how many parameters were found whole there
    """

    def __init__(
        self,
        folder: Path,
        parameters: Sequence[Sequence[Spec]],
        key: str | None = None,
        max_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self._folder = folder
        self._files = _split(parameters, max_bytes)
        self._names = _file_names(len(self._files))
        self._headers = [_header([spec for specs in parameters for spec in specs]) for parameters in self._files]
        self._at_file, self._at = 0, 0  # the next to be written: its file, its place there
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
        self.done = sum(len(parameters) for parameters in self._files[: self._at_file]) + self._at

    def write(self, tensors: Sequence[TensorBytes]) -> None:
        """Write the next parameter."""
        specs = self._files[self._at_file][self._at] if self._at_file < len(self._files) else []
        if [(tensor.dtype, tensor.shape) for tensor in tensors] != [(spec.dtype, spec.shape) for spec in specs]:
            raise RunError(f"{[tensor[:2] for tensor in tensors]} came where {list(specs)} was planned")
        if self._file is None:
            self._file = (self._folder / self._names[self._at_file]).open("wb")
            self._digest = hashlib.sha256()
            self._put(memoryview(self._headers[self._at_file]))
        for tensor in tensors:
            self._put(tensor.data)
        self._file.flush()
        self._at += 1
        self._note(self._entry())
        if self._at == len(self._files[self._at_file]):
            self._next_file()

    def finish(self, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Read every file again; write the checksums, and the index where there are several files.

        progress  called with each count of bytes read

        Raises RunError if tensors are missing, WeightsError if the disk holds other bytes than were
        written.
        """
        if self._at_file < len(self._files):
            raise RunError(f"{self._files[self._at_file][self._at][0].name} was planned but not written")
        for name, header, parameters in zip(self._names, self._headers, self._files, strict=True):
            path = self._folder / name
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while data := file.read(_BLOCK):
                    digest.update(data)
                    progress(len(data))
            found = validate_header(path)
            planned = {spec.name: (DTYPE_NAMES[spec.dtype], spec.shape) for specs in parameters for spec in specs}
            if digest.hexdigest() != self._checksums[name] or found != planned or not header:
                raise _damaged(path)
        lines = [f"{checksum}  {name}\n" for name, checksum in self._checksums.items()]
        self._write_text(MANIFEST, "".join(lines))
        if len(self._files) > 1:
            self._write_text(INDEX, self._index())
        (self._folder / JOURNAL).unlink()

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are complete, headers included."""
        return sum((self._folder / name).stat().st_size for name in self._names[: self._at_file])

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
            # The disk writes while the next tensors are computed, and not all at the end.
            self._unflushed = 0
            self._flush = self._flusher.submit(sync, self._file.fileno())

    def _next_file(self) -> None:
        if self._file is not None:
            if self._flush is not None:
                self._flush.result()
            self._file.close()
            self._file, self._flush = None, None
        self._checksums[self._names[self._at_file]] = self._digest.hexdigest()
        self._at_file, self._at = self._at_file + 1, 0

    def _write_text(self, name: str, text: str) -> None:
        path = self._folder / name
        path.write_bytes(text.encode())
        check_written(path, hashlib.sha256(text.encode()).hexdigest())

    def _index(self) -> str:
        total = sum(spec.nbytes for parameters in self._files for specs in parameters for spec in specs)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {
                spec.name: file
                for file, parameters in zip(self._names, self._files, strict=True)
                for specs in parameters
                for spec in specs
            },
        }
        return json.dumps(index, indent=2) + "\n"

    # --- the journal ----------------------------------------------------------------------------

    def _note(self, line: str) -> None:
        self._journal.write(line + "\n")
        self._journal.flush()

    def _entry(self) -> str:
        return f"{self._at_file} {self._at} {self._digest.hexdigest()}"

    def _read_journal(self, key: str | None) -> set[str]:
        try:
            found, *entries = (self._folder / JOURNAL).read_text().splitlines()
        except (OSError, ValueError):
            return set()
        return set(entries) if key and found == key else set()

    def _resume(self, before: set[str]) -> None:
        """Go to the end of what an earlier run wrote and its journal confirms."""
        while self._at_file < len(self._files):
            path = self._folder / self._names[self._at_file]
            if not path.is_file():
                return
            with path.open("rb") as file:
                end = self._resume_file(file, before)
            if self._at < len(self._files[self._at_file]):
                if end:
                    self._file = path.open("r+b")
                    self._file.truncate(end)
                    self._file.seek(end)
                return
            self._next_file()

    def _resume_file(self, file: BinaryIO, before: set[str]) -> int:
        """Return how many bytes of a file can stay; set `_at` and `_digest` accordingly."""
        header = self._headers[self._at_file]
        if file.read(len(header)) != header:
            return 0
        end = len(header)
        digest = hashlib.sha256(header)
        for specs in self._files[self._at_file]:
            nbytes = sum(spec.nbytes for spec in specs)
            ahead = digest.copy()
            for start in range(0, nbytes, _BLOCK):
                ahead.update(file.read(min(_BLOCK, nbytes - start)))
            if f"{self._at_file} {self._at + 1} {ahead.hexdigest()}" not in before:
                break
            digest, end, self._at = ahead, end + nbytes, self._at + 1
            self._digest = digest.copy()
            self._note(self._entry())
        return end if self._at else 0


def check_written(path: Path, checksum: str) -> None:
    """Read a file again. Raises WeightsError if the disk holds other bytes than were written."""
    if sha256(path) != checksum:
        raise _damaged(path)


def _damaged(path: Path) -> WeightsError:
    return WeightsError(f"{path.name} is not on the disk as it was written; check the disk")


def _split(parameters: Sequence[Sequence[Spec]], max_bytes: int) -> list[list[Sequence[Spec]]]:
    """Divide the parameters among files."""
    files: list[list[Sequence[Spec]]] = [[]]
    size = 0
    for specs in parameters:
        nbytes = sum(spec.nbytes for spec in specs)
        if files[-1] and size + nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(specs)
        size += nbytes
    return files


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _header(specs: Sequence[Spec]) -> bytes:
    """Return a safetensors header for these tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for spec in specs:
        ends = [offset, offset + spec.nbytes]
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": ends}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text
