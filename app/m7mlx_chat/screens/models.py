"""Choosing a model: of those here, those worth fetching, or any by name; with progress."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.css.query import NoMatches
from textual.screen import ModalScreen
from textual.widgets import Button, Input, OptionList, ProgressBar, Select, Static
from textual.widgets.option_list import Option
from textual.worker import Worker

from m7mlx.errors import M7Error
from m7mlx.files.hub import DEMO, is_gguf, is_repo_id
from m7mlx.memory import machine_memory
from m7mlx.terminal import visible
from m7mlx.units import in_gigabytes
from m7mlx_chat import jobs
from m7mlx_chat.catalog import Entry, describe, full_name, models, on_this_machine, shown_name

# characters; what is typed as a name is seen whole, but for long paths
_NAME, _LONGEST, _PROBLEM, _TOLD = 40, 72, 60, 500
_COLORS = {"fits": "not bold green", "tight": "not bold yellow", "too big": "not bold red"}
_BITS = (("4 bits", 4), ("8 bits", 8), ("6 bits", 6), ("3 bits", 3), ("as it is", 0))


class Chosen(NamedTuple):
    """A model to load: what it is called, and where it lies."""

    name: str
    folder: Path


class Models(ModalScreen[Chosen | None]):
    """A list, a line for any other name, and what is under way.

    Esc ends a download, which can be gone on with.
    """

    DEFAULT_CSS = """
    Models { align: center middle; background: $background 70%; }
    Models .box {
        width: 100; max-width: 96%; height: auto; max-height: 90%; padding: 1 2;
        border: round $primary; background: $surface;
    }
    Models .title { text-style: bold; height: auto; padding-bottom: 1; }
    Models OptionList {
        height: auto; max-height: 16; padding: 0; border: none; background: $surface;
        text-wrap: nowrap; text-overflow: ellipsis;
    }
    Models OptionList:focus { border: none; }
    Models Input { margin-top: 1; background: $boost; padding: 0 1; }
    Models .row { height: 1; margin: 1 0; }
    Models .row Button { margin-right: 2; }
    Models Select { width: 18; }
    Models.-short .box { padding: 0 2; }
    Models.-short OptionList { max-height: 10; }
    Models.-short .title { padding-bottom: 0; }
    Models #told { height: auto; color: $text-muted; }
    Models ProgressBar { height: 1; display: none; }
    Models.-busy ProgressBar { display: block; }
    """

    def __init__(
        self,
        own: Path,
        current: str,
        used: Sequence[str],
        title: str = "Models",
        start: str | None = None,
    ) -> None:
        """Prepare the screen.

        own      the folder for models that are converted here
        current  the model that answers
        used     names used before
        start    a model to fetch at once
        """
        super().__init__()
        self._own = own
        self._current, self._used, self._title, self._start = current, used, title, start
        self._entries: list[Entry] = []
        self._job: Worker[None] | None = None

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(self._title, classes="title", markup=False)
            yield OptionList(markup=False)
            yield Input(placeholder="another: folder, GGUF file, or org/name on the Hub", compact=True)
            with Horizontal(classes="row"):
                yield Button("Use", id="use", variant="primary", compact=True)
                yield Button("Convert to", id="convert", compact=True)
                yield Select(_BITS, value=4, allow_blank=False, id="bits", compact=True)
            yield ProgressBar(show_eta=True)
            yield Static("", id="told", markup=False)

    def on_mount(self) -> None:
        self.set_class(self.app.size.height < 32, "-short")
        self._tell(f"this machine has {in_gigabytes(machine_memory(), 0)} of memory")
        self._list()
        if self._start is not None:
            self._take(self._start)

    @work(thread=True, exclusive=True, group="list")
    def _list(self) -> None:
        entries = models(self._used, self._own)
        self.app.call_from_thread(self._listed, entries)

    def _listed(self, entries: list[Entry]) -> None:
        if not self.is_mounted:  # left meanwhile
            return
        self._entries = entries
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options([Option(self._line(entry), disabled=bool(entry.problem)) for entry in entries])
        options.highlighted = next(
            (i for i, e in enumerate(entries) if e.name == self._current), 0 if entries else None
        )
        options.focus()

    def _line(self, entry: Entry) -> Text:
        """Return two lines: what a model is; what it sees and takes."""
        name = visible(shown_name(entry, self._own))
        mark = "●" if entry.name == self._current else " "
        text = Text(
            f"{mark} {name if len(name) <= _LONGEST else '…' + name[1 - _LONGEST :]:<{_NAME}} ",
            style="bold",
            no_wrap=True,
            overflow="ellipsis",
        )
        if entry.problem:
            problem = entry.problem.replace(f"{entry.folder}/", "").replace(str(entry.folder), "it")
            return text.append(f"\n    {visible(problem)[:_PROBLEM]}", style="not bold dim")
        text.append(f"{in_gigabytes(entry.nbytes, 2):>9}  {entry.bits}\n    ", style="not bold")
        text.append(f"{entry.fit} {in_gigabytes(entry.memory)}", style=_COLORS[entry.fit])
        sees = f"window {entry.window:,}" if entry.window else f"context {entry.context:,}"
        about = [sees, entry.about, "a download" if entry.folder is None else ""]
        return text.append(" · " + " · ".join(filter(None, about)), style="not bold dim")

    # --- choosing ---------------------------------------------------------------------------------

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        entry = self._entries[event.option_index]
        if entry.folder is not None:
            self.dismiss(Chosen(entry.name, entry.folder))
        else:
            self._take(entry.name)

    @on(Input.Submitted)
    @on(Button.Pressed, "#use")
    def _use(self) -> None:
        name = self.query_one(Input).value.strip()
        highlighted = self.query_one(OptionList).highlighted
        if not name and highlighted is not None:
            name = self._entries[highlighted].name
        if name:
            self._take(name)

    def _take(self, name: str) -> None:
        """Use a model by name: at once where it is here, after fetching it where it is not."""
        name = full_name(name, self._own)
        folder = on_this_machine(name)
        if folder is not None and folder.is_dir():
            problem = describe(name, folder).problem
            if problem:
                self._tell(problem)
            else:
                self.dismiss(Chosen(name, folder))
        elif is_gguf(name) or (folder is not None and folder.is_file()):
            self._begin(f"fetching and converting {name}", lambda: jobs.fetch(name, self._progress), name)
        elif name == DEMO or is_repo_id(name) or "/" not in name:
            self._begin(f"fetching {name}", lambda: jobs.fetch(name, self._progress), name)
        else:
            self._tell(f"there is no folder {name}")

    @on(Button.Pressed, "#convert")
    def _convert(self) -> None:
        source = self.query_one(Input).value.strip()
        bits = self.query_one(Select).value
        if not source:
            self._tell("name what to convert: a folder, a GGUF file, or org/name on the Hub")
            return
        number = int(str(bits)) or None
        job = lambda: jobs.convert(source, number, self._own, self._progress)  # noqa: E731
        self._begin(f"converting {source}", job, None)

    # --- what is under way ------------------------------------------------------------------------

    def _begin(self, label: str, job: Callable[[], Awaitable[Path]], name: str | None) -> None:
        if self._job is not None:
            self._tell("one thing at a time: Esc ends what is under way")
            return
        self.add_class("-busy")
        self.query_one(ProgressBar).update(total=None, progress=0)
        self._tell(f"{label} … Esc stops; the next time goes on from there")
        self._job = self._work(job, name)

    @work(exclusive=True, group="job")
    async def _work(self, job: Callable[[], Awaitable[Path]], name: str | None) -> None:
        try:
            folder = await job()
        except M7Error as error:
            self._tell(f"✗ {error}")
        except asyncio.CancelledError:
            self._tell("stopped; the next time goes on from there")
            raise
        else:
            self.dismiss(Chosen(name or str(folder), folder))
        finally:
            self._job = None
            self.remove_class("-busy")

    def _progress(self, done: int, total: int, task: str) -> None:
        self.query_one(ProgressBar).update(total=total or None, progress=done)
        if task:
            self._tell(f"{task} … Esc stops; the next time goes on from there")

    def _tell(self, text: str) -> None:
        with suppress(NoMatches):  # a job that ends because the screen has gone
            self.query_one("#told", Static).update(visible(text[:_TOLD]))

    def close(self) -> None:
        """Esc: end what is under way; then leave."""
        if self._job is not None:
            self._job.cancel()
        else:
            self.dismiss(None)
