"""What can follow what is being typed: commands after "/", files after "@"."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from textual.fuzzy import FuzzySearch

from m7mlx.units import counted
from m7mlx_chat.actions import COMMANDS
from m7mlx_chat.attach import files_below

_MOST = 200  # names of a folder
_LIKELY, _RANKED = 50, 500  # files below that are shown, and that are compared with each other
_FRESH_SECONDS = 10.0  # after which the names of files are read again


class Choice(NamedTuple):
    """`text` takes the place of what was typed; a file is put into the message instead."""

    text: str
    shown: str
    about: str = ""
    is_file: bool = False


def commands(typed: str) -> list[Choice]:
    """The commands that begin with what was typed, "/" included."""
    return [
        Choice(f"/{name} " if action.takes else f"/{name}", f"/{name} {action.takes}".strip(), action.help)
        for name, action in sorted(COMMANDS.items())
        if name.startswith(typed[1:].lower())
    ]


def paths(typed: str) -> list[Choice]:
    """Files and folders whose path begins with what was typed."""
    folder, _, start = typed.rpartition("/")
    place = Path(os.path.expanduser(folder + "/" if typed.startswith(("/", "~")) or folder else "."))
    try:
        with os.scandir(place) as found:
            entries = [entry for entry in found if entry.name.lower().startswith(start.lower())]
    except OSError:
        return []
    shown = sorted((e for e in entries if start.startswith(".") or not e.name.startswith(".")), key=lambda e: e.name)
    prefix = f"{folder}/" if "/" in typed else ""
    choices = []
    if prefix and not start and shown:
        choices.append(Choice(prefix, prefix, "all text files in it and below", is_file=True))
    for entry in shown[:_MOST]:
        try:
            if entry.is_dir():
                choices.append(Choice(f"{prefix}{entry.name}/", f"{entry.name}/"))
            elif entry.is_file():
                size = entry.stat().st_size
                choices.append(Choice(prefix + entry.name, entry.name, counted(size, "byte"), is_file=True))
        except OSError:
            continue
    return choices


class FilesBelow:
    """The names of all files in the folder where the chat was started, and below it."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._fresh_until = 0.0
        self._search = FuzzySearch()

    def is_stale(self) -> bool:
        """Whether the names should be read, and say so only once for each time."""
        now = time.monotonic()
        stale, self._fresh_until = now > self._fresh_until, max(self._fresh_until, now + _FRESH_SECONDS)
        return stale

    def read(self) -> None:
        """Read all names; a thread of its own can wait for a slow disk."""
        self._names = [path.as_posix() for path in files_below(Path())]

    def like(self, typed: str) -> list[Choice]:
        """The files whose path has the letters typed in that order, the likeliest first."""
        if not typed or typed.startswith(("/", "~", ".")):
            return []
        letters = re.compile(".*?".join(map(re.escape, typed)), re.IGNORECASE)
        found = sorted((name for name in self._names if letters.search(name)), key=len)[:_RANKED]
        found.sort(key=lambda name: -self._search.match(typed, name)[0])
        return [Choice(name, name, is_file=True) for name in found[:_LIKELY]]
