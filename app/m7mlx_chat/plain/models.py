"""Which model answers in the line mode: loaded before it is asked, changed by name or number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from m7mlx.errors import InputError, RunError
from m7mlx.files.hub import check_name
from m7mlx.units import in_gigabytes
from m7mlx_chat.catalog import describe, full_name, models, on_this_machine, shown_name
from m7mlx_chat.environment import Environment
from m7mlx_chat.events import AnyEngine, Event, Failed, Loading, Ready
from m7mlx_chat.headless import fetch_model
from m7mlx_chat.plain.writing import Progress, Written
from m7mlx_chat.session import Session
from m7mlx_chat.settings import Settings

_WAIT = 0.1  # seconds to wait for an event at a time: Ctrl-C is heard in between


class ModelLines:
    """The engine's model, and what the user is offered to choose by number.

    offered  what the numbers of a list do that was just shown
    """

    def __init__(self, session: Session, engine: AnyEngine, environment: Environment, written: Written) -> None:
        self.session = session
        self.store = session.store
        self.engine = engine
        self.environment = environment
        self.written = written
        self.offered: list[Callable[[], None]] = []
        self._folder: Path | None = None
        self._working: Settings | None = None  # those that the engine was last set up with

    def load(self, folder: Path) -> None:
        """Load a model with the settings of now; returns when it answers.

        Raises RunError or InputError if it cannot be loaded; settings that do not fit it are told,
        and those before come back.
        """
        self._folder, self.session.ready = folder, None
        self.engine.load(folder, self.session.settings)
        progress = Progress(self.written, "loading the model")
        is_ready = False
        while not is_ready:
            for event in self.engine.drain(_WAIT):
                self.session.handle(event)
                is_ready = self._take(event, progress)
        self._working = self.session.settings

    def _take(self, event: Event, progress: Progress) -> bool:
        """Take what comes while a model is loaded; returns whether it is."""
        match event:
            case Loading(done, total):
                progress(done, total)
            case Failed(message, fatal, exit_status):
                if fatal or self._working is None:
                    raise (InputError if exit_status == InputError.exit_status else RunError)(message)
                self.written.tell(f"error: {message}")
                self.session.configure(self.session.settings.with_engine_of(self._working))
            case _:
                pass
        return isinstance(event, Ready)

    def check_loaded(self) -> None:
        """Load the model again if an attempt to load it, or another, has been ended."""
        if self.session.ready is None:
            if self._folder is None:
                raise InputError("no model is loaded; /model NAME chooses one")
            self.load(self._folder)

    def configure(self, settings: Settings) -> None:
        """Take other settings; where they concern the engine, it is set up anew."""
        before = self.session.settings
        if settings.model != before.model:
            self._use(settings.model, settings)
        else:
            self.session.configure(settings)
            if not settings.sets_engine_up_as(before):
                self.check_loaded() if self._folder is None else self.load(self._folder)

    # --- choosing another -------------------------------------------------------------------------

    def action_model(self, argument: str = "") -> None:
        """Take a model by name, or list those there are."""
        if argument:
            self._use(argument, self.session.settings)
        else:
            self._list()

    def _list(self) -> None:
        used = {c.model for c in self.store.conversations(limit=200) if c.model}
        entries = [entry for entry in models(sorted(used), self.environment.models) if not entry.problem]
        for number, entry in enumerate(entries, 1):
            name = shown_name(entry, self.environment.models)
            where = "" if entry.folder is not None else ", a download"
            now = ", in use" if entry.name == self.session.settings.model else ""
            size = f"{in_gigabytes(entry.nbytes, 2)}, {entry.bits}, {entry.fit}"
            self.written.tell(f"{number}  {name}: {size}{where}{now}")
        self.written.tell("A number, or /model NAME, chooses one.")
        self.offered = [partial(self.action_model, entry.name) for entry in entries]

    def _use(self, name: str, settings: Settings) -> None:
        """Load another model, which is fetched if it is not here; the one before goes."""
        name = full_name(name, self.environment.models)
        folder = on_this_machine(name)
        if folder is None or not folder.is_dir():
            check_name(name)
            folder = fetch_model(name, Progress(self.written, f"fetching {name}"))
        if problem := describe(name, folder).problem:
            raise InputError(problem)
        self.session.configure(settings.changed({"model": name}))
        self.load(folder)
        self.written.tell(f"{name} answers now")
