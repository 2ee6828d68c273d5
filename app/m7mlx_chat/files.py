"""Text files that are read, and files that conversations are written to."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx.files.disk import write_whole
from m7mlx.jsonfile import NotRegularError, open_regular

MOST_BYTES = 2_000_000  # some 500,000 tokens: more than any model here reads


def read_text(path: Path) -> str:
    """A text file, bounded. Raises InputError."""
    data = read_bounded(path, MOST_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text (UTF-8)") from None
    if "\0" in text:
        raise InputError(f"{path} is not text: it has NUL bytes")
    return text.replace("\r\n", "\n")


def read_bounded(path: Path, most: int) -> bytes:
    """A regular file of at most so many bytes. Raises InputError."""
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
    except NotRegularError as error:
        raise InputError(str(error)) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    if len(data) > most:
        raise InputError(f"{path} has more than {most / 1e6:.0f} MB; give a part of it")
    return data


def fenced(text: str, language: str = "") -> str:
    """A text as a code block that nothing in it can end."""
    longest = max((len(marks) for marks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


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
