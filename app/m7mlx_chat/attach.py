"""What `@` and --file put into a message: a text file, a PDF's text, a folder's text files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx.units import counted
from m7mlx_chat.files import MOST_BYTES, fenced, read_text
from m7mlx_chat.pdf import read_pdf

MOST_FILES = 20_000  # of a folder and all below it
# Folders of what others wrote, or of what is made from the rest.
_NOT_OURS = frozenset({"__pycache__", "node_modules", "venv", "site-packages", "target", "build", "dist"})


def attached(name: str) -> str:
    """A file or a folder as part of a message: its name, and its text as a code block.

    Raises InputError for what has no text.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _folder(path)
    return _block(path.name, read_pdf(path) if is_pdf(path) else read_text(path))


def is_pdf(path: Path) -> bool:
    """Whether a file is taken for a PDF, by its name."""
    return path.suffix.lower() == ".pdf"


def takes_long(name: str) -> bool:
    """Whether reading may take longer than a key press."""
    path = Path(os.path.expanduser(name))
    return path.is_dir() or is_pdf(path)


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and below it, in order, at most `MOST_FILES`.

    Hidden ones and those of other people's packages are left out, and so is what cannot be read.
    """
    count = 0
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _NOT_OURS)
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(place, name)
                count += 1
                if count == MOST_FILES:
                    return


def _folder(folder: Path) -> str:
    """All text files below a folder, each with its path; what is no text is counted."""
    blocks: list[str] = []
    size = others = 0
    for path in files_below(folder):
        try:
            text = read_text(path)
        except InputError:
            others += 1
            continue
        blocks.append(_block(path.relative_to(folder).as_posix(), text))
        size += len(blocks[-1].encode())
        if size > MOST_BYTES:
            raise InputError(f"{folder} has more than {MOST_BYTES / 1e6:.0f} MB of text; give a part of it")
    if not blocks:
        raise InputError(f"{folder} has no text files")
    left = f"; {others} more, which are not text, are left out" if others else ""
    name = folder.name or folder.resolve().name
    return f"{name}/ ({counted(len(blocks), 'file')}{left}):\n\n" + "\n\n".join(blocks)


def _block(name: str, text: str) -> str:
    return f"{name}:\n{fenced(text.rstrip(chr(10)))}"
