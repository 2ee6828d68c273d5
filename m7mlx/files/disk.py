"""Writing files that last: whole or not at all, and on the disk when the call returns."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from pathlib import Path

from m7mlx.errors import DiskError
from m7mlx.paths import user_path

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is too big",
}


def why(error: OSError) -> str:
    """Say in words what went wrong with a file."""
    return _FULL.get(error.errno or 0) or error.strerror or str(error)


def sync(descriptor: int) -> None:
    """Wait until the disk holds what was written to an open file.

    On macOS fsync only hands it to the drive, which may keep it in a cache of its own; F_FULLFSYNC
    has the drive write it.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with contextlib.suppress(OSError):  # some file systems do not know it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_path(path: Path) -> None:
    """Wait until the disk holds a file's content, or the list of names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems refuse that for folders, which they keep anyway
            raise
    finally:
        os.close(descriptor)


def write_whole(path: str | Path, data: str | bytes, *, new: bool = False) -> None:
    """Write a file that appears under its name once all of it is on the disk.

    new  there must be no such file yet

    Until then a file that was there stays as it is. A link stays a link; a pipe or a device is
    simply written to. Raises DiskError, with `new` FileExistsError.
    """
    path = user_path(path)
    content = data if isinstance(data, bytes) else data.encode("utf-8", "replace")
    target = Path(os.path.realpath(path))
    work = target.with_name(f".m7mlx-{secrets.token_hex(4)}.partial")
    there = False
    try:
        there = target.exists()
        if new and there:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        if there and not target.is_file():
            target.write_bytes(content)
            return
        _write(work, content, target.stat().st_mode & 0o777 if there else None)
        if new:
            _name(work, target)
        else:
            work.replace(target)
        sync_path(target.parent)
    except FileExistsError:
        raise
    except OSError as error:
        kept = "; the file that was there is as it was" if there else ""
        raise DiskError(f"{path} cannot be written: {why(error)}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            work.unlink()


def _write(work: Path, content: bytes, mode: int | None) -> None:
    descriptor = os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        if mode is not None:
            os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        sync(descriptor)


def _name(work: Path, target: Path) -> None:
    """Give a finished file its name. Raises FileExistsError where another file has it."""
    try:
        os.link(work, target)
    except FileExistsError:
        raise
    except OSError:  # this file system has no hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        work.rename(target)
