"""Asking: send, answer again, go on, edit a question; stop an answer, leave the chat."""

from __future__ import annotations

from collections.abc import Callable

from textual import on

from m7mlx_chat.actions import is_command
from m7mlx_chat.commands.copying import CopyCommands
from m7mlx_chat.commands.models import ModelCommands
from m7mlx_chat.commands.tools import ToolCommands
from m7mlx_chat.commands.turns import TurnCommands
from m7mlx_chat.focus import give_focus
from m7mlx_chat.screens.approval import Approve
from m7mlx_chat.screens.models import Models
from m7mlx_chat.screens.settings import SettingsDrawer
from m7mlx_chat.under_way import UnderWay
from m7mlx_chat.view import Parts
from m7mlx_chat.widgets.composer import Composer

_ARMED_SECONDS = 2.0  # for the second Ctrl+C, which quits


class AskCommands(TurnCommands, ModelCommands, CopyCommands, ToolCommands):
    """The way of a question to the model, and back from it."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.first_text = 0.0  # when the answer under way began to come; 0: not yet
        self._quit_armed = False

    # --- asking -----------------------------------------------------------------------------------

    @on(Composer.Submitted)
    async def _send(self, event: Composer.Submitted) -> None:
        """Send what was written, or run the command that it is."""
        text = event.unsent.message()
        if not text:
            return
        if is_command(event.unsent.shown):
            self.composer.reset(self.composer.aside)
            done = False
            try:
                done = await self.run_command(event.unsent.shown)
            finally:
                if not done and not self.composer.text:  # there is no such command, or it has failed
                    self.composer.reset(event.unsent)
        elif (edited := self.drafts.edited) is not None and self.store.message(edited).role == "assistant":
            await self._write(edited, text)
        elif self.state == "no model":
            self.action_model()
        elif self.state == "answering" and edited is None:
            self.wait_for_turn(event.unsent)
        else:
            await self._begin(lambda: self._ask(text))

    def _ask(self, text: str) -> UnderWay:
        question = self.drafts.edited
        asked = self.session.ask(text) if question is None else self.session.edit(question, text)
        self.drafts.sent(self.session.conversation)
        return asked

    async def _write(self, answer: int, text: str) -> None:
        """Keep what the user made of an answer as another version of it."""
        self.session.write(answer, text)
        self.drafts.sent(self.session.conversation)
        give_focus(self.composer)
        await self.show_all()

    async def _begin(self, begin: Callable[[], UnderWay]) -> None:
        """Begin an answer, and show it. What is not sent stays in the composer."""
        begin()
        self.first_text = 0.0
        give_focus(self.composer)
        await self.show_all()

    async def action_retry(self) -> None:
        await self._retry(None)

    async def action_retry_message(self) -> None:
        if (selected := self.selected) is not None:
            await self._retry(selected.message.id)

    async def _retry(self, message: int | None) -> None:
        await self._begin(lambda: self.session.retry(message))
        under_way, settings = self.session.under_way, self.session.settings
        if under_way is not None and under_way.settings.temperature != settings.temperature:
            sampled = f"{under_way.settings.temperature:g}"
            self.tell(f"at temperature 0 it would be the same: sampled at {sampled}; F2 sets the temperature")

    async def action_resume(self) -> None:
        await self._begin(self.session.resume)

    async def action_replay(self) -> None:
        await self._begin(self.session.replay)

    async def action_begin(self, text: str = "") -> None:
        """Have the last question answered again, beginning with a text."""
        if text.strip() and self.state == "no model":
            self.action_model()
        else:
            await self._begin(lambda: self.session.begin_with(text))

    # --- editing a question, or an answer ---------------------------------------------------------

    def action_edit(self) -> None:
        if (question := self.session.last_question) is not None:
            self._edit(question.id)

    def action_edit_message(self) -> None:
        if (selected := self.selected) is not None:
            self._edit(selected.message.id)

    def _edit(self, message: int) -> None:
        """Let what is written take the place of a message. Raises Busy for the answer under way."""
        under_way = self.session.under_way
        if under_way is not None and under_way.answer == message:
            self.session.check_free()
        if self.session.conversation is not None:
            self.drafts.edit(self.session.conversation, message)
            give_focus(self.composer)

    # --- stopping ---------------------------------------------------------------------------------

    def action_stop(self) -> None:
        """End the first of what is open or under way."""
        if isinstance(self.screen, Models | SettingsDrawer):
            self.screen.close()
        elif isinstance(self.screen, Approve):
            self.screen.dismiss(None)
        elif len(self.screen_stack) > 1:
            self.pop_screen()
        elif self.composer.close_completion():
            pass
        elif self.waits_here and self.drafts.edited is None:
            self.action_take_back()
        elif (under_way := self.session.under_way) is not None:
            self.session.stop()
            if self.session.under_way is None:  # nothing had to be waited for
                self.call_later(self.show_calls, under_way)
            else:
                self.show_state("stopping …")
        elif self.drafts.edited is not None:
            self.drafts.leave_edit()
            give_focus(self.composer)
        else:
            give_focus(self.composer)

    def action_interrupt(self) -> None:
        """Do what Ctrl+C means here: copy, clear, stop, or quit the second time."""
        selected = self.screen.get_selected_text() or self.composer.selected_text
        if selected:
            self.copy_text(selected)
        elif self.composer.text:
            self.drafts.clear()
            self.tell("cleared · Ctrl+Z brings it back")
        elif self.state == "answering":
            self.action_stop()
        elif self._quit_armed:
            self.exit()
        else:
            self._quit_armed = True
            self.notify("Press Ctrl+C again to quit.", timeout=_ARMED_SECONDS)
            self.set_timer(_ARMED_SECONDS, self._disarm)

    def _disarm(self) -> None:
        self._quit_armed = False
