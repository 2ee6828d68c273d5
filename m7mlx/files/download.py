"""Large files from the Hub, resumed after anything: a cut connection, Ctrl-C, kill -9.

huggingface_hub downloads into a file with a random name and starts anew the next time. Here the
file is named after its SHA-256, so that the next process finds it. Once whole, it is put where
huggingface_hub keeps it, which then takes it as its own. The lock is huggingface_hub's, so two
processes wait for each other.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import urlparse

from m7mlx.errors import DiskError, DownloadError
from m7mlx.files import huggingface
from m7mlx.files.checksums import remember, sha256
from m7mlx.files.disk import sync, sync_path
from m7mlx.units import in_gigabytes

# huggingface_hub is imported where it is used: 0.4 s, which models on this machine do not need.
_PART = ".m7mlx-part"


class RemoteFile(NamedTuple):
    """A file of a repository: its size in bytes and, if large, the SHA-256 it is stored under."""

    size: int
    sha256: str | None


def fetch_blob(
    repo: str,
    name: str,
    revision: str | None,
    file: RemoteFile,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Put a file into the Hub's cache under its SHA-256; skip it where it is there, or has none.

    advance  called with each number of bytes that are here, those of an earlier run first

    Raises DownloadError for wrong bytes, DiskError where they do not fit, and what huggingface_hub
    raises.
    """
    from huggingface_hub.utils import WeakFileLock

    advance = advance or (lambda count: None)
    if file.sha256 is None:
        return
    blob = huggingface.find_storage(repo) / "blobs" / file.sha256
    if blob.exists():
        advance(file.size)
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock = huggingface.find_lock(repo, file.sha256)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():  # no other process has fetched it meanwhile
            part = blob.with_name(blob.name + _PART)
            _fetch(repo, name, revision, file, part, advance)
            if sha256(part) != file.sha256:
                part.unlink()
                raise DownloadError(f"{name} is not what the Hub promised (wrong SHA-256) and was removed; try again")
            part.rename(blob)
            sync_path(blob.parent)
            remember(blob, file.sha256)


def remove_leftovers(repo: str) -> None:
    """Remove what killed downloads of huggingface_hub have left: it never resumes them."""
    from filelock import FileLock, Timeout  # as huggingface_hub

    for path in (huggingface.find_storage(repo) / "blobs").glob("*.incomplete"):
        lock = huggingface.find_lock(repo, path.name.split(".")[0])
        # A process holds the lock while it writes.
        with contextlib.suppress(Timeout, OSError), FileLock(lock, timeout=0):
            path.unlink(missing_ok=True)


def _fetch(
    repo: str,
    name: str,
    revision: str | None,
    file: RemoteFile,
    part: Path,
    advance: Callable[[int], None],
) -> None:
    """Fetch what `part` does not hold yet."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    done = part.stat().st_size if part.exists() else 0
    if done > file.size:
        done = 0
    advance(done)
    if done == file.size and part.exists():
        return
    free = shutil.disk_usage(part.parent).free
    if free < file.size - done:
        raise DiskError(
            f"{name} takes {in_gigabytes(file.size - done)} more, the disk has {in_gigabytes(free)} free; make room, "
            "then run the command again to resume"
        )
    headers = build_hf_headers()
    url = hf_hub_url(repo, name, revision=revision)
    location = get_hf_file_metadata(url, headers=headers, retry_on_errors=True).location
    if urlparse(location).netloc != urlparse(url).netloc:
        headers.pop("authorization", None)  # elsewhere the address itself is signed
    with part.open("r+b" if done else "wb") as stream:
        stream.seek(done)
        stream.truncate()
        try:
            counted = cast(BinaryIO, _Counted(stream, file.size, advance))
            huggingface.fetch_rest(location, counted, done=done, size=file.size, headers=headers, name=name)
        finally:
            stream.flush()
            sync(stream.fileno())


class _Counted:
    """A file that reports what is written to it, and refuses more than its size."""

    def __init__(self, file: BinaryIO, size: int, advance: Callable[[int], None]) -> None:
        self._file, self._size, self._advance = file, size, advance

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._size:
            self._file.truncate(0)
            raise DownloadError(f"more came than the {self._size:,} bytes that the Hub promised; try again")
        self._advance(len(data))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
