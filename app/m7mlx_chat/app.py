"""The chat in the terminal: all groups of commands, and what the engine says, on a timer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from m7mlx.errors import M7Error
from m7mlx.units import counted
from m7mlx_chat import dates
from m7mlx_chat.actions import unknown_keys
from m7mlx_chat.commands.background import BackgroundCommands
from m7mlx_chat.commands.conversations import ConversationCommands
from m7mlx_chat.commands.estimate import EstimateCommands
from m7mlx_chat.commands.files import FileCommands
from m7mlx_chat.commands.full import FullCommands
from m7mlx_chat.commands.looking import LookCommands
from m7mlx_chat.commands.prompts import PromptCommands
from m7mlx_chat.commands.settings import SettingsCommands
from m7mlx_chat.commands.titles import TitleCommands
from m7mlx_chat.commands.unsent_text import UnsentTextCommands
from m7mlx_chat.commands.versions import VersionCommands
from m7mlx_chat.events import (
    Called,
    Done,
    Event,
    Failed,
    Given,
    Loading,
    Note,
    Prefill,
    Ready,
    Text,
    Thought,
    Titled,
    Waiting,
)
from m7mlx_chat.focus import give_focus
from m7mlx_chat.under_way import UnderWay
from m7mlx_chat.view import Parts
from m7mlx_chat.widgets.composer import Composer
from m7mlx_chat.widgets.messages import Answer

_DRAIN_SECONDS, _SLOWEST = 1 / 15, 0.25  # more often shows nothing more
# of this thread's time, while an answer comes: where the model has all cores, drawing costs tokens
_DRAWING = 0.04
_LOOK_SECONDS = 5.0  # what other instances changed, what could not be saved
_DRAFT_SECONDS = 1.0  # between two looks at what is being written
_SIDEBAR_FROM = 120  # columns: where there is room for the conversations at the start


class ChatApp(
    BackgroundCommands,
    TitleCommands,
    EstimateCommands,
    FullCommands,
    VersionCommands,
    UnsentTextCommands,
    PromptCommands,
    ConversationCommands,
    SettingsCommands,
    FileCommands,
    LookCommands,
):
    """One chat on the screen, from its start to its end."""

    def __init__(
        self,
        parts: Parts,
        *,
        folder: Path | None = None,
        fetch: bool = False,
        question: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Prepare a chat.

        folder    the model to load; None lets the user choose
        fetch     the settings' model is not here, but wanted: fetch it
        question  to be asked at once
        notes     what went wrong before
        """
        super().__init__(parts)
        self.folder = folder
        self._fetch = fetch
        self._question = question
        self._notes = notes
        # when to drain next; the work of this thread until the last time
        self._not_before = self._worked = 0.0
        self.is_loading = folder is not None
        self._day = dates.today()

    async def on_mount(self) -> None:
        self._take_config()
        for note in self._notes:
            self.tell(note, is_error=True)
        give_focus(self.composer)
        self.engine.start()
        self.set_interval(_DRAIN_SECONDS, self._drain_in_time)
        self.set_interval(_LOOK_SECONDS, self.look_around)
        self.set_interval(_DRAFT_SECONDS, self._keep_draft)
        self.sidebar.set_class(self.size.width >= _SIDEBAR_FROM, "-shown")
        with self.going_on():
            await self.show_all()
        with self.going_on():
            if self.folder is None:
                self.choose_model(self.session.settings.model if self._fetch else "")
            else:
                self.load_model()
        with self.going_on():
            if self._question is not None:
                self.session.ask(self._question)
                await self.show_all()

    def _take_config(self) -> None:
        """Take theme and keys from the user's file, and tell what cannot be."""
        if self.config.theme in self.available_themes:
            self.theme = self.config.theme
        elif self.config.theme:
            self.tell(f"{self.config.path} names a theme that is not there: {self.config.theme}", is_error=True)
        if unknown := unknown_keys(self.config.keys):
            self.tell(f"{self.config.path} gives keys to what is not there: {', '.join(unknown)}", is_error=True)
        with self.going_on():
            self.set_keymap(self.config.keys)
        self.watch(self, "theme", self.keep_theme, init=False)

    def _is_ending(self) -> bool:
        """Whether what is on the screen is just being taken away."""
        # asked all the time: to look through all widgets for it would take as long as drawing
        composer = self.screen_stack[0].query_one_optional(Composer)
        return not self.is_running or composer is None or not composer.is_attached

    def _keep_draft(self) -> None:
        if not self._is_ending():
            self.drafts.keep()

    def look_around(self) -> None:
        """From time to time: save what could not be saved, show what other instances did."""
        if self._is_ending():
            return
        with contextlib.suppress(M7Error):
            self.session.save_again()
            if self.store.changed_elsewhere():
                self.show_conversations()
        with self.going_on():
            self.write_title_when_quiet()
        if self._day != dates.today():  # yesterday's times are days now
            self._day = dates.today()
            self.transcript.show_times()
            self.show_conversations()

    # --- what the engine says ---------------------------------------------------------------------

    async def _drain_in_time(self) -> None:
        """Drain, the later the more work it was to draw what came the last time."""
        now, worked = time.monotonic(), time.thread_time()
        if now >= self._not_before:
            self._not_before = now + min((worked - self._worked) / _DRAWING, _SLOWEST)
            self._worked = worked
            await self.drain()

    async def drain(self) -> None:
        """Take what the engine has said since the last time."""
        if self._is_ending():  # the rest is for whoever ends the chat
            return
        for event in [*self.engine.drain(), *self.session.tools.drain()]:
            if self._is_ending():
                return
            with self.going_on():
                await self._handle(event)
        self.ask_for_call()

    async def _handle(self, event: Event) -> None:
        under_way = self.session.under_way
        # where the disk is full, say: what is on the screen stays, and is saved later
        with self.going_on():
            self.session.handle(event)
        answer = self.transcript.answer(under_way.answer) if under_way else None
        match event:
            case Loading(done, total):
                self.show_state(f"loading the model {_bar(done, total)} {done / 1e6:,.0f}/{total / 1e6:,.0f} MB")
            case Ready():
                self.model_is_ready()
                self.pace.forget()
                self.show_state()
                self.show_seen()
            case Note(message):
                self.tell(message, is_error=True)
            case Waiting():
                self.show_state("the model is answering in another page; this one waits · Esc stops")
            case Prefill() if answer is not None:
                self._show_prefill(event, answer)
            case Text():
                await self._show_text(event, answer)
            case Thought():
                self._show_thought(event, answer)
            case Titled():
                self.show_conversations()
            case Called() | Given() if under_way is not None:
                self.first_text = 0.0
                await self.show_calls(under_way)
            case Done() | Failed():
                await self._show_end(event, answer, under_way)
            case _:
                pass
        self.show_gauge()

    def _show_prefill(self, event: Prefill, answer: Answer) -> None:
        reused = f" · {event.reused:,} known" if event.reused else ""
        bar = _bar(event.done, event.total)
        left = self.left_to_read(event)
        answer.show_progress(f"reading {bar} {event.done:,}/{counted(event.total, 'token')}{reused}{left}")
        self.show_state("reading … Esc stops")

    async def _show_text(self, event: Text, answer: Answer | None) -> None:
        self.first_text = self.first_text or time.monotonic()
        if answer is not None:
            answer.show_progress("")
            await answer.write(event.text)
        seconds = time.monotonic() - self.first_text
        speed = f" · {(event.count - 1) / seconds:.1f} tok/s" if event.count > 1 and seconds > 0.5 else ""
        self.show_state(f"answering · {counted(event.count, 'token')}{speed} · Esc stops")

    def _show_thought(self, event: Thought, answer: Answer | None) -> None:
        if answer is not None:
            answer.show_progress("")
            answer.think(event.text)
        self.show_state(f"thinking · {counted(event.count, 'token')} · Esc stops")

    async def _show_end(self, event: Done | Failed, answer: Answer | None, under_way: UnderWay | None) -> None:
        """Show how an answer, or an attempt to load a model, has ended."""
        was_loading, self.is_loading = self.is_loading, False
        self.leave_call()
        if answer is not None:
            await answer.finish(self.store.message(answer.message.id))
        elif isinstance(event, Failed):
            self.tell(event.message, is_error=True)
        if isinstance(event, Done):
            self.learn_pace(event)
        compared = await self._go_on_after(under_way, event.message if isinstance(event, Failed) else None)
        if isinstance(event, Failed) and not compared:
            self.model_failed(event, was_loading)
        room = None if compared else self._lacking_room(event, under_way)
        if room is not None and under_way is not None and len(self.screen_stack) == 1:
            self.offer_room(under_way, room)

    async def show_end_between(self, under_way: UnderWay) -> None:
        message, answer = self.store.message(under_way.answer), self.transcript.answer(under_way.answer)
        if answer is not None:
            await answer.finish(message)
        error = message.statistics.get("error")
        await self._go_on_after(under_way, str(error) if error else None)

    async def _go_on_after(self, under_way: UnderWay | None, failure: str | None) -> bool:
        """Show what an answer's end has changed, and let what waits have its turn.

        Returns whether the answer was another model's, to be compared.
        """
        self.show_conversations()
        self.show_state()
        self.show_seen()
        compared = self.end_comparison(under_way, failure)
        if failure is not None:
            self.give_back_turns()
        elif under_way is not None:
            with self.going_on():
                self.first_text = 0.0
                await self.next_turn()
        self.stir()
        if under_way is not None and self.session.under_way is None:
            self.announce_end(under_way)
        return compared

    def _lacking_room(self, event: Done | Failed, under_way: UnderWay | None) -> int | None:
        """How many tokens the model sees, if an answer lacked room for more."""
        if isinstance(event, Failed):
            return event.room
        ready, is_empty = self.session.ready, not event.text and event.reason == "length"
        return ready.context if is_empty and ready and under_way and under_way.begun is not None else None


def _bar(done: int, total: int, width: int = 16) -> str:
    filled = round(width * done / max(total, 1))
    return "▰" * filled + "▱" * (width - filled)
