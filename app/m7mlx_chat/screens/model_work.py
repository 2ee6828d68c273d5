"""What is done about models from the list: fetching, converting, deleting; with progress."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from textual import work
from textual.css.query import NoMatches
from textual.screen import ModalScreen
from textual.widgets import ProgressBar, Select, Static
from textual.worker import Worker

from m7mlx.errors import M7Error
from m7mlx.terminal import visible
from m7mlx.units import in_bytes
from m7mlx_chat import jobs
from m7mlx_chat.catalog import Entry, shown_name
from m7mlx_chat.hub_search import Offer
from m7mlx_chat.removal import Removal, find_removal, remove
from m7mlx_chat.screens.dialogs import Choose
from m7mlx_chat.screens.model_ways import Way, ways_of_file, ways_on_hub

_TOLD = 500  # characters


class Chosen(NamedTuple):
    """A model to load: what it is called, and where it lies."""

    name: str
    folder: Path


class ModelWork(ModalScreen[Chosen | None]):
    """A screen with `#bits` to convert to, a bar of progress, and `#told` for what is said.

    One thing at a time is under way; what has been fetched or converted is chosen.
    """

    def __init__(self, own: Path, loaded: Collection[Path]) -> None:
        """Prepare the screen; arguments as for `Models`."""
        super().__init__()
        self.own = own
        self._loaded = loaded
        self._job: Worker[None] | None = None
        self.hint = ""  # what is said while nothing else is

    def list_again(self) -> None:
        """Find what is on this machine now."""
        raise NotImplementedError

    @property
    def bits(self) -> int | None:
        """The bits to convert to; None for as many as there are."""
        return int(str(self.query_one(Select).value)) or None

    def begin(self, label: str, job: Callable[[], Awaitable[Path]], name: str | None) -> None:
        """Begin what gives a folder, unless something is under way; then choose that folder.

        name  what the model is called then; None for the folder itself
        """
        if self._job is not None:
            self.tell("one thing at a time: Esc ends what is under way")
            return
        self.add_class("-busy")
        self.query_one(ProgressBar).update(total=None, progress=0)
        self.tell(f"{label} … Esc stops; the next time goes on from there")
        self._job = self._work(job, name)

    @work(exclusive=True, group="job")
    async def _work(self, job: Callable[[], Awaitable[Path]], name: str | None) -> None:
        try:
            folder = await job()
        except M7Error as error:
            self.tell(f"✗ {error}")
        except asyncio.CancelledError:
            self.tell("stopped; the next time goes on from there")
            raise
        else:
            self.dismiss(Chosen(name or str(folder), folder))
        finally:
            self._job = None
            self.remove_class("-busy")

    def report(self, done: int, total: int, task: str) -> None:
        """Show how far it is."""
        self.query_one(ProgressBar).update(total=total or None, progress=done)
        if task:
            self.tell(f"{task} … Esc stops; the next time goes on from there")

    def tell(self, text: str) -> None:
        """Say something below the list."""
        with suppress(NoMatches):  # a job that ends because the screen has gone
            self.query_one("#told", Static).update(visible(text[:_TOLD]))

    def stop(self) -> bool:
        """End what is under way; returns whether there was something."""
        if self._job is None:
            return False
        self._job.cancel()
        return True

    # --- files of other programs, and the Hub -----------------------------------------------------

    @work(exclusive=True, group="ask")
    async def plan(self, entry: Entry, file: Path) -> None:
        """Offer to convert a file; use what it was converted into before."""
        bits, name = self.bits or 4, shown_name(entry, self.own)
        for target in (jobs.target_folder(name, None, self.own), jobs.target_folder(name, bits, self.own)):
            with suppress(OSError):
                if (target / "config.json").stat().st_mtime > file.stat().st_mtime:
                    self.dismiss(Chosen(str(target), target))
                    return
        self.tell(f"looking at {name} …")
        try:
            plan = await jobs.plan(jobs.target_folder(name, None, self.own), str(file), None)
        except M7Error as error:
            self.tell(f"✗ {error}".replace(str(file), name))
            return
        self.tell(self.hint)
        title = f"{name} ({in_bytes(entry.nbytes)}) stays as it is; the result lies in {self.own}"
        self._offer(title, ways_of_file(str(file), entry.nbytes, plan, bits), name)

    @work(exclusive=True, group="ask")
    async def look(self, offer: Offer) -> None:
        """Offer to fetch a model that was found on the Hub."""
        self.tell(f"looking at {offer.repo} …")
        try:
            files = await jobs.list_files(offer.repo)
        except M7Error as error:
            self.tell(f"✗ {error}")
            return
        ways = ways_on_hub(offer, files, self.bits or 4)
        self.tell(self.hint if ways else f"{offer.repo} holds nothing that can be used here")
        if ways:
            self._offer(f"{offer.repo}, {offer.downloads:,} downloads", ways, "")

    def _offer(self, title: str, ways: Sequence[Way], name: str) -> None:
        """Let the user choose one of these ways; `name` is what a folder is called after."""
        if not self.is_current:  # left meanwhile
            return

        def take(chosen: str | None) -> None:
            if chosen is not None:
                self._go(ways[int(chosen)], name)

        shown = {str(i): visible(way.text) for i, way in enumerate(ways)}
        self.app.push_screen(Choose(visible(title), shown), take)

    def _go(self, way: Way, name: str) -> None:
        if way.fetches:
            self.begin(f"fetching {way.source}", lambda: jobs.fetch(way.source, self.report), way.source)
            return
        target = jobs.target_folder(name or way.source.rpartition("/")[2], way.bits, self.own)
        job = lambda: jobs.convert_to(target, way.source, way.bits, self.report)  # noqa: E731
        self.begin(f"converting {name or way.source}", job, None)

    # --- deleting ---------------------------------------------------------------------------------

    def delete(self, entry: Entry) -> None:
        """Delete a model, after asking."""
        if self._job is not None:
            self.tell("something is under way: Esc ends it; then a model can be deleted")
        else:
            self._measure(entry)

    @work(thread=True, exclusive=True, group="ask")
    def _measure(self, entry: Entry) -> None:
        try:
            removal = find_removal(entry, self.own, self._loaded)
        except M7Error as error:
            self.app.call_from_thread(self.tell, f"✗ {error}")
        else:
            self.app.call_from_thread(self._confirm, shown_name(entry, self.own), removal)

    def _confirm(self, name: str, removal: Removal) -> None:
        if not self.is_current:  # left meanwhile
            return

        def take(chosen: str | None) -> None:
            if chosen == "delete":
                self._remove(name, removal)

        where = "from the Hub's cache, which other programs use, too" if removal.is_shared else str(removal.path)
        ways = {"keep": "Keep it", "delete": f"Delete it: frees {in_bytes(removal.nbytes)}"}
        self.app.push_screen(Choose(visible(f"Delete {name}? ({where})"), ways), take)

    @work(thread=True, exclusive=True, group="remove")
    def _remove(self, name: str, removal: Removal) -> None:
        try:
            told = f"{name} is deleted: {in_bytes(remove(removal))} are free again"
        except M7Error as error:
            told = f"✗ {error}"
        self.app.call_from_thread(self.tell, told)
        self.list_again()
