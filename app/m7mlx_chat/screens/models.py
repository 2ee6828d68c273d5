"""Choosing a model: of those here, those worth fetching, or any by name; with progress."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.events import Key
from textual.widgets import Button, Input, OptionList, ProgressBar, Select, Static
from textual.widgets.option_list import Option
from textual.worker import Worker

from m7mlx.errors import M7Error
from m7mlx.files.hub import ALIASES, DEMO, is_gguf, is_repo_id
from m7mlx.memory import machine_memory
from m7mlx.units import in_gigabytes
from m7mlx_chat import jobs
from m7mlx_chat.catalog import Entry, describe, full_name, models, on_this_machine
from m7mlx_chat.elsewhere import find_elsewhere
from m7mlx_chat.environment import Programs
from m7mlx_chat.focus import give_focus
from m7mlx_chat.hub_search import Offer
from m7mlx_chat.screens.model_rows import Row, SearchRow, by_last_use, drawn, matching
from m7mlx_chat.screens.model_work import Chosen, ModelWork

_PAUSE = 0.4  # seconds without a key before the Hub is asked for what has been typed
_BITS = (("4 bits", 4), ("8 bits", 8), ("6 bits", 6), ("3 bits", 3), ("as it is", 0))


class Models(ModelWork):
    """A list, a line that narrows it or gives any other name, and what is under way.

    The Hub is asked only when the user wants that: for a name, or by the search. Esc ends a
    download, which can be gone on with.
    """

    BINDINGS = [  # noqa: RUF012
        Binding("ctrl+s", "search", "search the Hub", show=False),
        Binding("ctrl+d,delete", "delete", "delete the model", show=False),
    ]

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
        *,
        programs: Programs,
        loaded: Collection[Path],
    ) -> None:
        """Prepare the screen.

        own       the folder for models that are converted here
        current   the model that answers
        used      names used before, the last one first
        start     a model to fetch at once
        programs  where other programs keep models
        loaded    folders of models that are in use
        """
        super().__init__(own, loaded)
        self._current, self._used, self._title, self._start = current, used, title, start
        self._programs = programs
        self._entries: list[Entry] = []
        self._offers: list[Offer] = []
        self._rows: list[Row] = []
        self._search: Worker[None] | None = None  # what asks the Hub; None unless the user wants it
        self._searched = ""  # what the offers were found by

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(self._title, classes="title", markup=False)
            yield OptionList(markup=False)
            yield Input(placeholder="narrow the list, or another: folder, GGUF file, org/name", compact=True)
            with Horizontal(classes="row"):
                yield Button("Use", id="use", variant="primary", compact=True)
                yield Button("Convert to", id="convert", compact=True)
                yield Select(_BITS, value=4, allow_blank=False, id="bits", compact=True)
            yield ProgressBar(show_eta=True)
            yield Static("", id="told", markup=False)

    def on_mount(self) -> None:
        self.set_class(self.app.size.height < 32, "-short")
        self.hint = f"Ctrl+S: search the Hub · Ctrl+D: delete · {in_gigabytes(machine_memory(), 0)} of memory here"
        self.tell(self.hint)
        self.list_again()
        if self._start is not None:
            self._take(self._start)

    # --- the list ---------------------------------------------------------------------------------

    def list_again(self) -> None:
        self._list()

    @work(thread=True, exclusive=True, group="list")
    def _list(self) -> None:
        theirs = find_elsewhere(self._programs)
        folders = {os.path.realpath(entry.folder) for entry in theirs if entry.folder is not None}
        ours = models(self._used, self.own)  # among them folders of others that were used by their paths
        ours = [entry for entry in ours if entry.folder is None or os.path.realpath(entry.folder) not in folders]
        self.app.call_from_thread(self._listed, [*ours, *theirs])

    def _listed(self, entries: list[Entry]) -> None:
        if not self.is_attached or self not in self.app.screen_stack:  # left meanwhile, or the app ends
            return
        self._entries = by_last_use(entries, self._used)
        self._show()
        if not isinstance(self.focused, Input):
            give_focus(self.query_one(OptionList))

    def _show(self) -> None:
        """Show what the typed text leaves of the list, and what was found on the Hub."""
        text = self.query_one(Input).value.strip()
        here = matching(self._entries, text, self.own) if text else self._entries
        self._rows = [*here, *self._offers]
        if text and text != self._searched:
            self._rows.append(SearchRow(text))
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(Option(drawn(row, self._current, self.own)) for row in self._rows)
        current = (i for i, row in enumerate(self._rows) if isinstance(row, Entry) and row.name == self._current)
        options.highlighted = next(current, 0 if self._rows else None)

    @property
    def _row(self) -> Row | None:
        """The row that is highlighted."""
        highlighted = self.query_one(OptionList).highlighted
        return self._rows[highlighted] if highlighted is not None else None

    def on_key(self, event: Key) -> None:
        """Go from the list to the line by typing, and back by an arrow."""
        field, options = self.query_one(Input), self.query_one(OptionList)
        if event.is_printable and event.character is not None:  # the line itself lets none through
            give_focus(field)
            field.insert_text_at_cursor(event.character)
            event.stop()
        elif self.focused is field and event.key == "down":
            give_focus(options)
            event.stop()

    @on(Input.Changed)
    def _typed(self) -> None:
        self._show()
        if self._search is not None:
            self._find(_PAUSE)

    # --- choosing ---------------------------------------------------------------------------------

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self._choose(self._rows[event.option_index])

    def _choose(self, row: Row) -> None:
        match row:
            case SearchRow():
                self.action_search()
            case Offer():
                self.look(row)
            case Entry(problem=problem) if problem:
                self.tell(f"✗ {problem}")
            case Entry(folder=Path() as folder):
                self.dismiss(Chosen(row.name, folder))
            case Entry(file=Path() as file):
                self.plan(row, file)
            case Entry():
                self._take(row.name)

    @on(Input.Submitted)
    @on(Button.Pressed, "#use")
    def _use(self) -> None:
        """Use what was typed, if it names a model, or else the first row that it leaves."""
        name, row = self.query_one(Input).value.strip(), self._row
        is_name = "/" in name or name in (DEMO, *ALIASES) or on_this_machine(name, self.own) is not None
        if name and (is_name or row is None):
            self._take(name)
        elif name and not (isinstance(row, SearchRow) or (isinstance(row, Entry) and row.folder is not None)):
            give_focus(self.query_one(OptionList))  # a download: a second Enter takes it
        elif row is not None:
            self._choose(row)

    def _take(self, name: str) -> None:
        """Use a model by name: at once where it is here, after fetching it where it is not."""
        name = full_name(name, self.own)
        folder = on_this_machine(name)
        if folder is not None and folder.is_dir():
            problem = describe(name, folder).problem
            if problem:
                self.tell(problem)
            else:
                self.dismiss(Chosen(name, folder))
        elif is_gguf(name) or (folder is not None and folder.is_file()):
            self.begin(f"fetching and converting {name}", lambda: jobs.fetch(name, self.report), name)
        elif (entry := self._elsewhere(name)) is not None:
            self._choose(entry)
        elif name == DEMO or is_repo_id(name) or "/" not in name:
            self.begin(f"fetching {name}", lambda: jobs.fetch(name, self.report), name)
        else:
            self.tell(f"there is no folder {name}")

    def _elsewhere(self, name: str) -> Entry | None:
        """Return the model that another program keeps under this name."""
        entries = self._entries or find_elsewhere(self._programs)
        return next((entry for entry in entries if entry.owner and entry.label == name), None)

    @on(Button.Pressed, "#convert")
    def _convert(self) -> None:
        source = self.query_one(Input).value.strip()
        if not source:
            self.tell("name what to convert: a folder, a GGUF file, or org/name on the Hub")
            return
        bits = self.bits
        job = lambda: jobs.convert(source, bits, self.own, self.report)  # noqa: E731
        self.begin(f"converting {source}", job, None)

    # --- the Hub ----------------------------------------------------------------------------------

    def action_search(self) -> None:
        """Search the Hub for what is typed, and from now on for what is typed in its place."""
        if self.query_one(Input).value.strip():
            self._find(0)
        else:
            give_focus(self.query_one(Input))
            self.tell("type a part of a name, then Ctrl+S searches the Hub for it")

    def _find(self, pause: float) -> None:
        self._search = self._ask_hub(self.query_one(Input).value.strip(), pause)

    @work(exclusive=True, group="search")
    async def _ask_hub(self, text: str, pause: float) -> None:
        await asyncio.sleep(pause)
        offers: list[Offer] = []
        if text:
            self.tell(f"asking the Hub for “{text}” … Esc stops")
            try:
                offers = await jobs.search(text)
            except M7Error as error:
                self.tell(f"✗ {error}")
                return
            self.tell(
                f"{len(offers)} found on the Hub" if offers else "the Hub has nothing of that name for this chat"
            )
        known = {ALIASES.get(entry.name, entry.name) for entry in self._entries}
        self._offers, self._searched = [offer for offer in offers if offer.repo not in known], text
        self._show()

    def action_delete(self) -> None:
        """Delete the model that is highlighted, after asking."""
        if isinstance(self._row, Entry):
            self.delete(self._row)

    def close(self) -> None:
        """Esc: end what is under way, then the search; then leave."""
        if self.stop():
            return
        if self._search is not None:
            self._search.cancel()
            self._search, self._offers, self._searched = None, [], ""
            self.tell(self.hint)
            self._show()
        else:
            self.dismiss(None)
