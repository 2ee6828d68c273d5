"""The chat in the terminal: widgets hold what is shown, `history` the conversation; the engine does the work."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from textual import on
from textual.app import App, ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Markdown, Static

from m7mlx.checksums import cache_dir
from m7mlx.errors import InputError, RunError
from m7mlx_chat.actions import BINDINGS
from m7mlx_chat.composer import Composer, Draft
from m7mlx_chat.engine import Done, Engine, Event, Failed, Loading, Prefill, Ready, Text
from m7mlx_chat.settings import Settings
from m7mlx_chat.terminal import visible
from m7mlx_chat.widgets import Answer, ErrorMessage, Help, UserMessage, Welcome, footer_of, gauge

_DRAIN_SECONDS = 1 / 15  # more often costs tokens per second and shows nothing more
State = Literal["loading", "ready", "answering", "broken"]


class ChatApp(App[None]):
    """One conversation with one model.

    state     what the engine does
    history   messages that the model has answered, as it is given them
    asked     the message being answered; it joins the history with its answer
    waiting   a message sent before the model was loaded
    failure   why there is no model
    """

    CSS_PATH = "chat.tcss"
    BINDINGS = BINDINGS
    ENABLE_COMMAND_PALETTE = False
    TITLE = "m7mlx"

    def __init__(self, engine: Engine, settings: Settings) -> None:
        super().__init__()
        self._engine = engine
        self._settings = settings
        self.state: State = "loading"
        self.history: list[dict[str, Any]] = []
        self.asked = Draft()
        self.waiting = Draft()
        self.failure: Failed | None = None
        self._answer: Answer | None = None
        self._info: Ready | None = None
        self._quit_armed = False

    def compose(self) -> ComposeResult:
        with Horizontal(id="top"):
            yield Static("m7mlx", id="brand")
            yield Static(visible(self._settings.model), id="model", markup=False)
            yield Static("", id="gauge")
        with VerticalScroll(id="chat", can_focus=False):
            yield Welcome(visible(self._settings.model))
        with Vertical(id="bottom"):
            yield Composer()
            with Horizontal(id="status"):
                yield Static("loading the model …", id="state", markup=False)
                yield Static("F1 help", id="hints")

    def on_mount(self) -> None:
        self.composer.focus()
        self.chat.anchor()
        self._engine.start()
        self.set_interval(_DRAIN_SECONDS, self._drain)

    @property
    def composer(self) -> Composer:
        return self.query_one(Composer)

    @property
    def chat(self) -> VerticalScroll:
        return self.query_one("#chat", VerticalScroll)

    # --- sending ----------------------------------------------------------------------------------------

    @on(Composer.Submitted)
    async def _send(self, event: Composer.Submitted) -> None:
        draft = event.draft
        if not draft.message() or self.state == "broken":
            return
        if self.state == "answering":
            self.notify("The model is still answering: Esc stops it.", timeout=3)
            return
        if self.state == "loading":
            if self.waiting.shown:
                self.notify("A message is waiting already.", timeout=3)
                return
            self.waiting = draft
            self._show_state("loading the model … your message is sent when it is ready")
        self.composer.reset()
        await self.query(Welcome).remove()
        await self.chat.mount(UserMessage(draft.message()))
        self.chat.anchor()
        if self.state == "ready":
            await self._ask(draft)

    async def _ask(self, draft: Draft) -> None:
        self.asked = draft
        self.state = "answering"
        self._show_state("reading …")
        self._answer = Answer()
        await self.chat.mount(self._answer)
        question = {"role": "user", "content": draft.message()}
        self._engine.submit(self._settings.messages([*self.history, question]))

    # --- what the engine says ---------------------------------------------------------------------------

    async def _drain(self) -> None:
        for event in self._engine.drain():
            if not self.is_running:  # left in the middle of it: the widgets are gone
                return
            await self._handle(event)

    async def _handle(self, event: Event) -> None:
        match event:
            case Loading(done, total):
                self._show_state(f"loading the model … {_bar(done, total)} {done / 1e6:,.0f}/{total / 1e6:,.0f} MB")
            case Ready():
                await self._model_ready(event)
            case Prefill(done, total) if done < total:
                self._show_state(f"reading {_bar(done, total)} {done:,}/{total:,} tokens")
            case Text(text):
                if self._answer is not None:
                    self._show_state("answering … Esc stops")
                    await self._answer.write(text)
            case Done():
                await self._answer_done(event)
            case Failed():
                await self._command_failed(event)

    async def _model_ready(self, event: Ready) -> None:
        self._info = event
        self.state = "ready"
        self._show_state("ready")
        self._show_gauge(0, 0)
        if self.waiting.shown:
            draft, self.waiting = self.waiting, Draft()
            await self._ask(draft)

    async def _answer_done(self, done: Done) -> None:
        if self._answer is not None:
            await self._answer.finish(footer_of(done))
        if done.ids:
            answer = {"role": "assistant", "content": done.text, "ids": done.ids}
            self.history += [{"role": "user", "content": self.asked.message()}, answer]
        elif not self.composer.text:
            self.composer.reset(self.asked)  # stopped before the first token: nothing was answered
        self._show_gauge(done.tokens_seen, done.cache_bytes)
        self._idle()

    async def _command_failed(self, failed: Failed) -> None:
        if self._answer is not None:
            if self._answer.text:
                await self._answer.finish("failed · the model does not remember this answer")
            else:
                await self._answer.remove()
        await self.chat.mount(ErrorMessage(failed.message))
        if not self.composer.text:
            self.composer.reset(self.asked if self.asked.shown else self.waiting)
        self._idle()
        if failed.fatal:
            self.state, self.failure = "broken", failed
            self._show_state("the model could not be loaded · Ctrl+Q quits")

    def _idle(self) -> None:
        self._answer, self.asked = None, Draft()
        self.state = "ready"
        self._show_state("ready")

    # --- actions ----------------------------------------------------------------------------------------

    def action_stop(self) -> None:
        if len(self.screen_stack) > 1:
            self.pop_screen()
        elif self.state == "answering":
            self._engine.cancel()
            self._show_state("stopping …")
        else:
            self.composer.focus()

    async def action_new(self) -> None:
        if self.state == "answering":
            self.notify("The model is still answering: Esc stops it.", timeout=3)
            return
        self.history, self.waiting = [], Draft()
        if self.state == "loading":
            self._show_state("loading the model …")
        await self.chat.remove_children()
        await self.chat.mount(Welcome(visible(self._settings.model)))
        self._show_gauge(0, 0)
        self.composer.focus()

    def action_copy_answer(self) -> None:
        answers = [m["content"] for m in self.history if m["role"] == "assistant"]
        if answers:
            self._copy(answers[-1])

    def action_interrupt(self) -> None:
        selected = self.screen.get_selected_text() or self.composer.selected_text
        if selected:
            self._copy(selected)
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

    def action_scroll(self, direction: str) -> None:
        if direction == "up":
            self.chat.scroll_page_up(animate=False)
        else:
            self.chat.scroll_page_down(animate=False)

    def action_help(self) -> None:
        if len(self.screen_stack) > 1:
            self.pop_screen()
        else:
            self.push_screen(Help())

    @on(Markdown.LinkClicked)
    def _show_link(self, event: Markdown.LinkClicked) -> None:
        """Show where a link leads; opening it is left to the user."""
        event.prevent_default()
        self.notify(visible(event.href), title="This link leads to", timeout=8, markup=False)

    def _copy(self, text: str) -> None:
        self.copy_to_clipboard(text)  # OSC 52, which macOS's Terminal does not know
        for tool in (["pbcopy"], ["wl-copy"], ["xclip", "-selection", "clipboard"]):
            if shutil.which(tool[0]):
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    subprocess.run(tool, input=text.encode(), timeout=2, check=False, stderr=subprocess.DEVNULL)
                break
        self.notify("Copied.", timeout=2)

    # --- showing ----------------------------------------------------------------------------------------

    def _show_state(self, text: str) -> None:
        self.query_one("#state", Static).update(text)

    def _show_gauge(self, seen: int, cache_bytes: int) -> None:
        if self._info is not None:
            line = gauge(seen, self._info.window, self._info.context, cache_bytes)
            self.query_one("#gauge", Static).update(line)


def _bar(done: int, total: int, width: int = 16) -> str:
    filled = round(width * done / max(total, 1))
    return "▰" * filled + "▱" * (width - filled)


def run_app(settings: Settings) -> int:
    """Show the chat until the user leaves; returns the exit status."""
    folder = settings.folder()
    log = cache_dir() / "chat.log"
    with _stderr_to_log(log):
        engine = Engine(folder, settings)
        app = ChatApp(engine, settings)
        try:
            app.run()
        finally:
            engine.close()
    if app.failure is not None:  # seen in the chat, and worth keeping when the chat has left the screen
        error = InputError if app.failure.exit_status == InputError.exit_status else RunError
        raise error(app.failure.message)
    if app.return_code:
        raise RunError(f"the interface failed; {log} says why")
    return 0


@contextlib.contextmanager
def _stderr_to_log(path: Path) -> Iterator[None]:
    """Send what native code writes to fd 2 into a file: on the screen it would land in the middle of the chat.

    Textual draws through `sys.__stderr__`. It gets the terminal that stdout is, since fd 2 may be redirected.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    errors = os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    before = sys.__stderr__
    sys.__stderr__ = os.fdopen(os.dup(1), "w", encoding="utf-8")  # type: ignore[misc]
    try:
        os.dup2(log, 2)
        yield
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        os.close(log)
        sys.__stderr__.close()
        sys.__stderr__ = before  # type: ignore[misc]
