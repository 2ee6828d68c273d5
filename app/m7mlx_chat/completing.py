"""What can follow what is being typed: commands after "/", files after "@"."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from m7mlx.units import counted
from m7mlx_chat.actions import COMMANDS

_MOST = 200  # names of a folder


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
