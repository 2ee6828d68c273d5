"""SHA-256 of large files: computed once for each state of a file, and remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path

from m7mlx.errors import ConfigError, DiskError, WeightsError
from m7mlx.files.disk import write_whole
from m7mlx.jsonfile import read_bytes
from m7mlx.paths import cache_dir

MANIFEST = "SHA256SUMS"  # beside the weights, as `sha256sum` writes it
_MAX_MANIFEST = 1_000_000  # bytes


def check_folder(folder: Path) -> None:
    """Compare each file that a folder's manifest names with its checksum; without a manifest, nothing.

    Raises WeightsError for a file that differs or is missing, and for a manifest that is none.
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
    """Whether the file has this SHA-256 (hexadecimal). Read once for each size and time of change."""
    if _read(_record()).get(str(path.resolve())) == _state(path, checksum):
        return True
    if sha256(path) != checksum:
        return False
    remember(path, checksum)
    return True


def remember(path: Path, checksum: str) -> None:
    """Note that the file, as it is now, has this SHA-256."""
    with contextlib.suppress(OSError, DiskError):  # where nothing can be noted, it is read again the next time
        known = {file: entry for file, entry in _read(_record()).items() if Path(file).exists()}
        _record().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_record(), json.dumps(known | {str(path.resolve()): _state(path, checksum)}))


def _record() -> Path:
    return cache_dir() / "verified.json"


def _state(path: Path, checksum: str) -> list[object]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, checksum]


def sha256(path: Path) -> str:
    """Hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries(manifest: Path) -> dict[str, str]:
    """File name → checksum; names stay inside the folder."""
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


def _read(record: Path) -> dict[str, object]:
    try:
        data = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
