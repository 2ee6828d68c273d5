"""The chat in the terminal: what is asked goes to the session, what the engine says comes back on a timer."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.events import DescendantFocus
from textual.filter import LineFilter
from textual.widgets import Markdown, Static

from m7mlx.errors import M7Error
from m7mlx.terminal import visible
from m7mlx_chat.actions import bindings, unknown_keys
from m7mlx_chat.commands import Commands
from m7mlx_chat.config import Config
from m7mlx_chat.engine import Engine
from m7mlx_chat.events import Done, Event, Failed, Loading, Prefill, Ready, Text
from m7mlx_chat.gate import Gate
from m7mlx_chat.screens.models import Chosen, Models
from m7mlx_chat.session import Session, UnderWay
from m7mlx_chat.settings import ENGINE, Settings
from m7mlx_chat.store.rows import clean
from m7mlx_chat.widgets.completion import Completion
from m7mlx_chat.widgets.composer import Composer, folded
from m7mlx_chat.widgets.sidebar import Sidebar
from m7mlx_chat.widgets.transcript import Transcript
from m7mlx_chat.widgets.welcome import Welcome
from m7mlx_chat.widgets.window import Window, line

_DRAIN_SECONDS, _SLOWEST = 1 / 15, 0.25  # more often shows nothing more
_DRAWING = 0.04  # of this thread's time, while an answer comes: where the model has all cores, drawing costs tokens
_LOOK_SECONDS = 5.0  # what other windows changed, what could not be saved
_COMMAND = re.compile(r"/[a-z]+( .*)?", re.DOTALL)
_SIDEBAR_FROM = 120  # columns: where there is room for the conversations at the start
_BESIDE_FROM, _FRAMED_FROM = 56, 10  # columns, rows: for the conversations beside the talk; for lines around it
State = Literal["no model", "loading", "ready", "answering"]


class ChatApp(Commands):
    """One window: the conversation of `session`, the engine's model, and what the user does."""

    BINDINGS = bindings("app")
    TITLE = "m7mlx"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (_BESIDE_FROM, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-low"), (_FRAMED_FROM, "-high")]  # noqa: RUF012
    CSS = """
    #top { height: 1; background: $panel; padding: 0 1; }
    #brand { width: auto; text-style: bold; color: $primary; }
    #model { width: 1fr; padding: 0 2; color: $text-muted; text-overflow: ellipsis; text-wrap: nowrap; }
    #gauge { width: auto; }
    #main { height: 1fr; }
    #talk { width: 1fr; min-width: 20; height: 1fr; }
    #bottom { height: auto; background: $background; }
    #status { height: 1; padding: 0 2; }
    #state { width: 1fr; color: $text-muted; }
    #hints { width: auto; color: $text-muted; }
    Screen.-narrow Sidebar { width: 100%; max-width: 100%; }
    Screen.-narrow .row { height: auto; layout: vertical; }
    Screen.-low #top, Screen.-low #status { display: none; }
    Screen.-low Composer { border: none; min-height: 1; max-height: 3; }
    """

    def __init__(
        self,
        engine: Engine,
        session: Session,
        config: Config,
        *,
        folder: Path | None = None,
        fetch: bool = False,
        question: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """What to begin with.

        folder    the model to load; None lets the user choose
        fetch     the settings' model is not here, but wanted: fetch it
        question  to be asked at once
        notes     what went wrong before
        """
        super().__init__(session, config)
        self.engine = engine
        self._folder = folder
        self._fetch = fetch
        self._question = question
        self._notes = notes
        self._damaged: set[str] = set()
        self._loading = folder is not None
        self._editing: int | None = None  # the question that the draft takes the place of
        self._first_text = 0.0
        self._not_before = self._worked = 0.0
        self._quit_armed = False
        self.failure: Failed | None = None  # why there is no model
        self._gate = Gate()
        self._working: Settings | None = None  # those that the engine was set up with

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), self._gate]

    def copy_to_clipboard(self, text: str) -> None:
        super().copy_to_clipboard(clean(text))  # a name of a file may be no UTF-8

    def compose(self) -> ComposeResult:
        with Horizontal(id="top"):
            yield Static("m7mlx", id="brand")
            yield Static("", id="model", markup=False)
            yield Static("", id="gauge")
        yield Window(id="window")
        with Horizontal(id="main"):
            yield Sidebar(self.store)
            with Vertical(id="talk"):
                yield Transcript(self.session, Welcome())
                with Vertical(id="bottom"):
                    completion = Completion()
                    yield completion
                    yield Composer(completion, lambda: self.store.prompts(limit=200))
                    with Horizontal(id="status"):
                        yield Static("", id="state", markup=False)
                        yield Static("/ commands · F1 help", id="hints")

    async def on_mount(self) -> None:
        if self.config.theme in self.available_themes:
            self.theme = self.config.theme
        elif self.config.theme:
            self.tell(f"{self.config.path} names a theme that is not there: {self.config.theme}", is_error=True)
        if unknown := unknown_keys(self.config.keys):
            self.tell(f"{self.config.path} gives keys to what is not there: {', '.join(unknown)}", is_error=True)
        for note in self._notes:
            self.tell(note, is_error=True)
        with self.going_on():
            self.set_keymap(self.config.keys)
        self.composer.focus()
        self.engine.start()
        self.set_interval(_DRAIN_SECONDS, self._drain_in_time)
        self.set_interval(_LOOK_SECONDS, self._look)
        self.sidebar.set_class(self.size.width >= _SIDEBAR_FROM, "-shown")
        with self.going_on():
            await self.show_all()
        with self.going_on():
            if self._folder is None:
                self.choose_model(self.session.settings.model if self._fetch else "")
            else:
                self.reload()
        with self.going_on():
            if self._question is not None:
                self.session.ask(self._question)
                await self.show_all()

    @property
    def state(self) -> State:
        if self.session.under_way is not None:
            return "answering"
        return "loading" if self._loading else "no model" if self.session.ready is None else "ready"

    # --- talking ----------------------------------------------------------------------------------------

    @on(Composer.Submitted)
    async def _send(self, event: Composer.Submitted) -> None:
        text = event.draft.message()
        if not text:
            return
        if _COMMAND.fullmatch(event.draft.shown):
            draft = event.draft
            self.composer.reset()
            if not await self.run_command(event.draft.shown):
                self.composer.reset(draft)
            return
        if self.state == "no model":
            self.action_model()
            return
        await self._begin(lambda: self.session.edit(self._editing, text) if self._editing else self.session.ask(text))

    async def _begin(self, begin: Callable[[], UnderWay]) -> None:
        """Begin an answer, and show it; where that raises, the draft stays."""
        begin()
        self.composer.reset()
        self._edit(None)
        self._first_text = 0.0
        self.composer.focus()
        await self.show_all()

    async def action_retry(self) -> None:
        await self._begin(self.session.retry)

    async def action_resume(self) -> None:
        await self._begin(self.session.resume)

    async def action_replay(self) -> None:
        await self._begin(self.session.replay)

    async def action_retry_message(self) -> None:
        if (selected := self.selected) is not None:
            await self._begin(lambda: self.session.retry(selected.message.id))

    def action_edit(self) -> None:
        questions = [m for m in self.store.read(self.session.line[-2:]) if m.role == "user"]
        if questions:
            self._edit(questions[-1].id)

    def action_edit_message(self) -> None:
        if (selected := self.selected) is not None:
            message = selected.message
            self._edit(message.id if message.role == "user" else message.parent)

    def _edit(self, question: int | None) -> None:
        """Let the draft take the place of a question; None: it is a new one."""
        self._editing = question
        self.composer.set_class(question is not None, "-editing")
        self.composer.border_title = "editing a question · Esc leaves it as it is" if question is not None else ""
        if question is not None:
            self.composer.reset(folded(self.store.message(question).text))
            self.composer.focus()

    async def action_fork(self) -> None:
        if self.session.line:
            await self._fork(self.session.line[-1])

    async def action_fork_message(self) -> None:
        if (selected := self.selected) is not None:
            await self._fork(selected.message.id)

    async def _fork(self, message: int) -> None:
        self.session.fork(message)
        self.composer.focus()
        await self.show_all()
        self.tell("a new conversation, with all up to here")

    async def action_sibling(self, step: int) -> None:
        if (selected := self.selected) is not None:
            await self.action_sibling_of(selected.message.id, step)

    async def action_sibling_of(self, message: int, step: int) -> None:
        if message not in self.session.line:  # a click that came late
            return
        place = self.session.line.index(message)
        self.session.switch(message, step)
        await self.transcript.sync(at=self.session.line[min(place, len(self.session.line) - 1)])

    # --- what the engine says ---------------------------------------------------------------------------

    async def _drain_in_time(self) -> None:
        """Drain, the later the more work it was to draw what came the last time."""
        now, worked = time.monotonic(), time.thread_time()
        if now >= self._not_before:
            self._not_before = now + min((worked - self._worked) / _DRAWING, _SLOWEST)
            self._worked = worked
            await self.drain()

    async def drain(self) -> None:
        """Take what the engine has said since the last time."""
        for event in self.engine.drain():
            if not self.is_running:
                return
            with self.going_on():
                await self._handle(event)

    async def _handle(self, event: Event) -> None:
        under_way, was_loading = self.session.under_way, self._loading
        with self.going_on():  # where the disk is full, say: what is on the screen stays, and is saved later
            self.session.handle(event)
        answer = self.transcript.answer(under_way.answer) if under_way else None
        match event:
            case Loading(done, total):
                self._tell_state(f"loading the model {_bar(done, total)} {done / 1e6:,.0f}/{total / 1e6:,.0f} MB")
            case Ready():
                self._loading, self.failure = False, None
                self._working = self.session.settings
                self._show_state()
            case Prefill(done, total, reused) if answer is not None:
                again = f" · {reused:,} known" if reused else ""
                answer.show_progress(f"reading {_bar(done, total)} {done:,}/{total:,} tokens{again}")
                self._tell_state("reading … Esc stops")
            case Text(text, count):
                self._first_text = self._first_text or time.monotonic()
                if answer is not None:
                    answer.show_progress("")
                    await answer.write(text)
                seconds = time.monotonic() - self._first_text
                speed = f" · {(count - 1) / seconds:.1f} tok/s" if count > 1 and seconds > 0.5 else ""
                self._tell_state(f"answering · {count:,} tokens{speed} · Esc stops")
            case Done() | Failed():
                self._loading = False
                if answer is not None and under_way is not None:
                    await answer.finish(self.store.message(under_way.answer))
                elif isinstance(event, Failed):
                    self.tell(event.message, is_error=True)
                self.show_conversations()
                self._show_state()
                if isinstance(event, Failed) and event.fatal:
                    self.failure = event
                    self.choose_model()
                elif isinstance(event, Failed) and was_loading and self._working is not None:
                    engine = {name: getattr(self._working, name) for name in ENGINE}
                    self.session.configure(self.session.settings.changed(engine))
            case _:
                pass
        self._show_gauge()

    def _look(self) -> None:
        """From time to time: save what could not be saved, show what other windows did."""
        with contextlib.suppress(M7Error):
            self.session.save_again()
            if self.store.changed_elsewhere():
                self.show_conversations()

    # --- actions ----------------------------------------------------------------------------------------

    def action_stop(self) -> None:
        if isinstance(self.screen, Models):
            self.screen.close()
        elif len(self.screen_stack) > 1:
            self.pop_screen()
        elif self.composer.close_completion():
            pass
        elif self.state == "answering":
            self.session.stop()
            self._tell_state("stopping …")
        elif self._editing is not None:
            self._edit(None)
            self.composer.reset()
        else:
            self.composer.focus()

    def action_interrupt(self) -> None:
        selected = self.screen.get_selected_text() or self.composer.selected_text
        if selected:
            self.copy_text(selected)
        elif self.composer.text:
            self.composer.reset()
        elif self.state == "answering":
            self.action_stop()
        elif self._quit_armed:
            self.exit()
        else:
            self._quit_armed = True
            self.notify("Press Ctrl+C again to quit.", timeout=2)
            self.set_timer(2, self._disarm)

    def _disarm(self) -> None:
        self._quit_armed = False

    async def action_new(self) -> None:
        self.session.new()
        self.composer.focus()
        await self.show_all()

    async def open_conversation(self, conversation: int) -> None:
        self.session.open(conversation)
        await self.show_all()

    @on(Sidebar.Chosen)
    async def _chosen(self, event: Sidebar.Chosen) -> None:
        await self.open_conversation(event.conversation)
        self.composer.focus()

    @on(Sidebar.Found)
    async def _found(self, event: Sidebar.Found) -> None:
        self.session.show(event.message)
        await self.show_all(found=event.message)
        self.composer.focus()

    def action_sidebar(self) -> None:
        self.sidebar.toggle_class("-shown")
        self.show_conversations()
        (self.sidebar.conversations if self.sidebar.is_shown else self.composer).focus()

    @on(DescendantFocus)
    def _uncover(self, event: DescendantFocus) -> None:
        """In a narrow terminal the list lies over the talk: who writes sees what he writes."""
        if event.widget is self.composer and self.size.width < _BESIDE_FROM:
            self.sidebar.remove_class("-shown")

    def action_find(self, argument: str = "") -> None:
        self.sidebar.add_class("-shown")
        self.show_conversations()
        self.sidebar.search(argument)

    def action_window(self) -> None:
        self.query_one(Window).toggle_class("-shown")
        self.call_after_refresh(self._show_gauge)

    def action_select(self, step: int) -> None:
        views = self.transcript.views
        at = views.index(self.selected) if self.selected in views else len(views)
        if 0 <= at + step < len(views):
            self.set_focus(views[at + step])  # at once: the next key may be under way already
        elif step > 0:
            self.set_focus(self.composer)

    async def action_scroll(self, direction: int) -> None:
        await self.transcript.page(direction)

    @on(Markdown.LinkClicked)
    def _show_link(self, event: Markdown.LinkClicked) -> None:
        """Show where a link leads; opening it is left to the user."""
        event.prevent_default()
        self.notify(visible(event.href), title="This link leads to", timeout=8, markup=False)

    # --- models -----------------------------------------------------------------------------------------

    def action_model(self, argument: str = "") -> None:
        self.choose_model(argument)

    def choose_model(self, name: str = "") -> None:
        """Let the user choose; a name is taken at once, if it can be."""
        if isinstance(self.screen, Models):
            return
        used = {c.model for c in self.store.conversations(limit=200) if c.model}
        title = "Which model?" if self.session.ready is None and not self._loading else "Models"
        if self.failure is not None:
            title = f"✗ {visible(self.failure.message)}\n\n{title}"
        current = self.session.settings.model if self.session.ready is not None else ""
        self.push_screen(Models(current, sorted(used), title, name or None), self._model_chosen)

    def _model_chosen(self, chosen: Chosen | None) -> None:
        if chosen is not None:
            self._folder = chosen.folder
            self.session.configure(self.session.settings.changed({"model": chosen.name}))
            self.reload()

    def reload(self) -> None:
        """Have the engine load the model with the settings of now."""
        if self._folder is not None:
            self.session.ready, self._loading = None, True
            self.engine.load(self._folder, self.session.settings)
            self._show_state()

    # --- showing ----------------------------------------------------------------------------------------

    async def show_all(self, found: int | None = None) -> None:
        """Show the session as it is now; `found`: the message that a search has led to."""
        await self.transcript.sync(at=found, found=True)
        self.show_conversations()
        self._show_state()
        self._show_gauge()
        self._tell_damage()

    def _tell_damage(self) -> None:
        """What could not be read as it must be, once."""
        new = sorted(self.store.damaged - self._damaged)
        self._damaged |= self.store.damaged
        if new:
            what = ", ".join(new[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
            self.tell(f"{self.store.path} is damaged: {what}. What can be read is shown", is_error=True)

    def show_conversations(self) -> None:
        self.sidebar.refresh_list(self.session.conversation)
        title = ""
        if self.session.conversation is not None:
            title = f" · {self.store.conversation(self.session.conversation).title}"
        self.query_one("#model", Static).update(visible(self.session.settings.model + title))

    def _show_state(self) -> None:
        text = {
            "no model": "no model is loaded · Ctrl+O chooses one",
            "loading": "loading the model …",
            "ready": "ready",
            "answering": "answering · Esc stops" if self.session.ready else "the model is loading; it answers then",
        }[self.state]
        self._tell_state(text)

    def _tell_state(self, text: str) -> None:
        self.query_one("#state", Static).update(text, layout=False)  # its place is fixed

    def _show_gauge(self) -> None:
        gauge, text = self.query_one("#gauge", Static), line(self.session.ready, self.session.seen)
        gauge.update(text, layout=text.cell_len != gauge.size.width)  # a layout per token would cost 5 % of them
        self.query_one(Window).show(self.session.ready, self.session.seen)


def _bar(done: int, total: int, width: int = 16) -> str:
    filled = round(width * done / max(total, 1))
    return "▰" * filled + "▱" * (width - filled)
