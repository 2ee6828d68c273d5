"""What can follow what is being typed: commands after "/", files after "@"."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.text import Text
from textual.fuzzy import FuzzySearch
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from m7mlx.terminal import visible
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


class Completion(OptionList, can_focus=False):
    """A list above the composer; the composer, which keeps the focus, moves in it."""

    DEFAULT_CSS = """
    Completion {
        height: auto; max-height: 8; margin: 0 1; padding: 0 1; border: round $primary 40%;
        background: $surface; display: none;
    }
    Completion.-open { display: block; }
    """

    def __init__(self) -> None:
        super().__init__(markup=False)
        self._choices: Sequence[Choice] = ()
        self.typed = ""

    @property
    def is_open(self) -> bool:
        return self.has_class("-open")

    @property
    def chosen(self) -> Choice:
        return self._choices[self.highlighted or 0]

    @property
    def is_exact(self) -> bool:
        """Whether all of the choice has been typed already."""
        return not self.chosen.is_file and self.chosen.text.strip() == self.typed

    def open(self, choices: Sequence[Choice], typed: str) -> None:
        """Show `choices` for what was `typed`; nothing where there are none."""
        if self.is_open and typed == self.typed and choices == self._choices:
            return  # what is highlighted stays
        self._choices, self.typed = choices, typed
        self.clear_options()
        self.add_options([Option(_line(choice)) for choice in choices])
        self.highlighted = 0 if choices else None
        self.set_class(bool(choices), "-open")

    def close(self) -> None:
        self.remove_class("-open")

    def move(self, direction: int) -> None:
        if direction > 0:
            self.action_cursor_down()
        else:
            self.action_cursor_up()


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
                choices.append(Choice(prefix + entry.name, entry.name, f"{size:,} bytes", is_file=True))
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


def _line(choice: Choice) -> Text:
    return Text.assemble((f"{visible(choice.shown):<28}", "bold"), (choice.about, "dim"), no_wrap=True)
