"""What was found out about large files, once for each state of a file: SHA-256, finite numbers."""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path

from m7mlx.errors import ConfigError, WeightsError
from m7mlx.files.records import read_record, write_record
from m7mlx.jsonfile import read_bytes

MANIFEST = "SHA256SUMS"  # beside the weights, as `sha256sum` writes it
_MAX_MANIFEST = 1_000_000  # bytes
_RECORD = "verified.json"
_FINITE = "finite.json"


def check_folder(folder: Path) -> None:
    """Compare each file that a folder's manifest names with its checksum, if there is a manifest.

    Raises WeightsError for a file that differs or is missing, and for a manifest that is malformed.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    for name, checksum in _entries(manifest).items():
        file = folder / name
        if not file.is_file():
            raise WeightsError(f"{folder} lacks {name}, which {MANIFEST} names; fetch or convert the model again")
        try:
            is_same = matches(file, checksum)
        except OSError as error:
            raise WeightsError(f"{file} cannot be read: {error.strerror}") from None
        if not is_same:
            raise WeightsError(
                f"{file} is damaged: its SHA-256 is not the one in {MANIFEST}; fetch or convert the model again "
                f"(or remove {MANIFEST}, if you changed the file yourself)"
            )


def matches(path: Path, checksum: str) -> bool:
    """Whether a file has this SHA-256 (hexadecimal).

    It is read again only when its size or its time of change differs from what is remembered.
    """
    if _is_known(path, checksum, _RECORD):
        return True
    if sha256(path) != checksum:
        return False
    remember(path, checksum)
    return True


def remember(path: Path, checksum: str) -> None:
    """Remember that a file, as it is now, has this SHA-256."""
    _remember(path, checksum, _RECORD)


def is_known_finite(path: Path) -> bool:
    """Whether it is remembered that all numbers of a file, as it is now, are finite."""
    return _is_known(path, "finite", _FINITE)


def remember_finite(path: Path) -> None:
    """Remember that all numbers of a file, as it is now, are finite."""
    _remember(path, "finite", _FINITE)


def _is_known(path: Path, what: str, record: str) -> bool:
    return bool(read_record(record).get(str(path.resolve())) == _state(path, what))


def _remember(path: Path, what: str, record: str) -> None:
    with contextlib.suppress(OSError):  # the file has just gone
        known = {f: entry for f, entry in read_record(record).items() if Path(f).exists()}
        write_record(record, known | {str(path.resolve()): _state(path, what)})


def _state(path: Path, what: str) -> list[object]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, what]


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries(manifest: Path) -> dict[str, str]:
    """Read a manifest: file name → checksum. Raises WeightsError where it is malformed."""
    try:
        text = read_bytes(manifest, _MAX_MANIFEST).decode("utf-8", "replace")
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\\0]+)", line)
        if match is None or match[2] in (".", ".."):
            raise WeightsError(f"{manifest} is damaged: {line[:80]!r} is no checksum and file name")
        found[match[2]] = match[1]
    return found
