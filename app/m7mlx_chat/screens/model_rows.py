"""The rows of the list of models: what each says, and which of them a text leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.text import Text

from m7mlx.terminal import visible
from m7mlx.units import in_gigabytes
from m7mlx_chat.catalog import Entry, shown_name
from m7mlx_chat.hub_search import Offer

# characters; what is typed as a name is seen whole, but for long paths
_NAME, _LONGEST, _PROBLEM = 40, 72, 60
_COLORS = {"fits": "not bold green", "tight": "not bold yellow", "too big": "not bold red"}


class SearchRow(NamedTuple):
    """The row that asks the Hub for a text."""

    text: str


Row = Entry | Offer | SearchRow


def matching(entries: Sequence[Entry], text: str, own: Path) -> list[Entry]:
    """Return those whose name has every word of a text in it."""
    words = text.casefold().split()
    return [
        entry
        for entry in entries
        if all(word in f"{shown_name(entry, own)} {entry.about} {entry.owner}".casefold() for word in words)
    ]


def by_last_use(entries: Sequence[Entry], used: Sequence[str]) -> list[Entry]:
    """Return those that are here, then those to convert, those to fetch, those of no use.

    Each kind has those used last first.
    """
    places = {name: place for place, name in enumerate(used)}

    def rank(entry: Entry) -> tuple[int, int]:
        kind = 3 if entry.problem else 0 if entry.folder is not None else 1 if entry.file is not None else 2
        return kind, places.get(entry.name, len(used))

    return sorted(entries, key=rank)


def drawn(row: Row, current: str, own: Path) -> Text:
    """Return the two lines of a row; `current` is the model that answers."""
    if isinstance(row, SearchRow):
        text = f"  search the Hub for “{visible(row.text)}”"
        return Text(text, style="not bold", no_wrap=True, overflow="ellipsis")
    if isinstance(row, Offer):
        return _offer(row)
    return _entry(row, current, own)


def _entry(entry: Entry, current: str, own: Path) -> Text:
    """Return what a model is; what it sees and takes."""
    text = _name("●" if entry.name == current else " ", shown_name(entry, own))
    if entry.problem:
        problem = entry.problem.replace(f"{entry.folder}/", "").replace(str(entry.folder), "it")
        about = f"{entry.owner}: {problem}" if entry.owner else problem
        return text.append(f"\n    {visible(about)[:_PROBLEM]}", style="not bold dim")
    text.append(f"{in_gigabytes(entry.nbytes, 2):>9}  {entry.bits}\n    ", style="not bold")
    if entry.file is not None:
        return text.append(f"{entry.owner} · a GGUF file, converted before it is used", style="not bold dim")
    text.append(f"{entry.fit} {in_gigabytes(entry.memory)}", style=_COLORS[entry.fit])
    sees = f"window {entry.window:,}" if entry.window else f"context {entry.context:,}"
    about_it = [sees, entry.about, entry.owner, "a download" if entry.folder is None else ""]
    return text.append(" · " + " · ".join(filter(None, about_it)), style="not bold dim")


def _offer(offer: Offer) -> Text:
    """Return what lies on the Hub: how large it is, and how often it was fetched."""
    text = _name(" ", offer.repo)
    size = (
        in_gigabytes(offer.nbytes, 2) if offer.nbytes else f"{offer.parameters / 1e9:.1f} B" * bool(offer.parameters)
    )
    text.append(f"{size:>9}  {offer.form}\n    ", style="not bold")
    about = [
        "on the Hub",
        f"{offer.downloads:,} downloads",
        "converted before it is used" if offer.is_packed else "",
        "its licence has to be accepted there" if offer.is_gated else "",
    ]
    return text.append(" · ".join(filter(None, about)), style="not bold dim")


def _name(mark: str, name: str) -> Text:
    name = visible(name)
    shown = name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]
    return Text(f"{mark} {shown:<{_NAME}} ", style="bold", no_wrap=True, overflow="ellipsis")
