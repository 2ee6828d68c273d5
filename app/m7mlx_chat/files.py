"""Text files that are read, and files that conversations are written to."""

from __future__ import annotations

import itertools
import os
import re
import stat
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx.files.disk import write_whole

MOST_BYTES = 2_000_000  # some 500,000 tokens: more than any model here reads


def read_text(path: Path) -> str:
    """A text file, bounded. Raises InputError."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{path} is no regular file")
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    if len(data) > MOST_BYTES:
        raise InputError(f"{path} has more than {MOST_BYTES / 1e6:.0f} MB; give a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text (UTF-8)") from None
    if "\0" in text:
        raise InputError(f"{path} is not text: it has NUL bytes")
    return text.replace("\r\n", "\n")


def _without_waiting(name: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to keeps nobody waiting."""
    return os.open(name, flags | os.O_NONBLOCK)


def free_name(folder: Path, title: str, suffix: str) -> Path:
    """A name for a new file, after a title; never that of a file that is there."""
    stem = re.sub(r"[^\w.-]+", "-", title).strip("-.")[:60] or "conversation"
    names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
    return next(path for name in names if not (path := folder / f"{name}{suffix}").exists())


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet. Raises InputError, DiskError."""
    try:
        write_whole(path, text, new=True)
    except FileExistsError:
        raise InputError(f"{path} exists; choose another name") from None
