"""Tools: the user's word on a call, what the calls of an answer gave, which tools there are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from rich.table import Table
from rich.text import Text

from m7mlx.terminal import one_line
from m7mlx_chat.events import Listing, Word
from m7mlx_chat.screens.approval import Approve
from m7mlx_chat.screens.dialogs import Figures
from m7mlx_chat.tools.change import change_tools
from m7mlx_chat.under_way import UnderWay
from m7mlx_chat.view import ChatView, Parts

_TYPING_SECONDS = 1.0
_DESCRIBED = 60  # characters of a tool's description


class ToolCommands(ChatView):
    """What the model calls, and may call."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._typed, self._typed_at = "", 0.0

    def ask_for_call(self) -> None:
        """Ask for the user's word on a call that waits for it, unless the user is busy."""
        under_way = self.session.under_way
        call = under_way.asking if under_way is not None else None
        self.leave_call()
        if under_way is None or call is None or len(self.screen_stack) > 1 or self._is_typing():
            return

        async def decide(word: str | None) -> None:
            still = self.session.under_way is under_way and under_way.asking == call
            if still and word is None:
                self.session.stop()
            elif still:
                with self.going_on():
                    self.session.decide(cast(Word, word))
            await self.show_calls(under_way)

        self.push_screen(Approve(call, self.session.tools.about(call)), decide)

    def leave_call(self) -> None:
        """Close the screen of a call that nobody waits for: its answer has ended."""
        under_way = self.session.under_way
        if isinstance(self.screen, Approve) and (under_way is None or self.screen.call != under_way.asking):
            self.screen.dismiss(None)

    def _is_typing(self) -> bool:
        """Whether what is written has changed a moment ago: the keys are not for another screen."""
        now, text = time.monotonic(), self.composer.text
        if text != self._typed:
            self._typed, self._typed_at = text, now
        return bool(text) and now - self._typed_at < _TYPING_SECONDS

    async def show_calls(self, under_way: UnderWay) -> None:
        """Show the calls of an answer as they are now, and its end if that is all."""
        answer = self.transcript.answer(under_way.answer)
        if self.session.under_way is not under_way:
            await self.show_end_between(under_way)
            return
        if answer is not None:
            await answer.show_steps(under_way.steps)
        if (call := under_way.calling or under_way.asking) is not None:
            what = "waits for your word" if under_way.asking is not None else "is running"
            self.show_state(f"{one_line(call.name)[:40]} {what} · Esc stops")
        else:
            self.show_state()

    async def show_end_between(self, under_way: UnderWay) -> None:
        """Show the end of an answer that the engine was not at work on."""
        raise NotImplementedError  # the app knows what follows an answer

    async def action_tools(self, argument: str = "") -> None:
        """Show all tools; turn them on or off; have one asked about again."""
        if (told := change_tools(self.session.tools, argument)) is not None:
            self.tell(told)
        else:
            title = "Tools" if self.session.tools.is_on else "Tools (off: /tools on)"
            self.push_screen(Figures(title, _table(self.session.tools.overview())))


def _table(listings: Sequence[Listing]) -> Table:
    table = Table.grid(padding=(0, 2))
    for one in listings:
        state = one.state + (f": {one.why}" if one.why else "")
        table.add_row(
            Text(one.server, style="bold"), Text(one_line(one.address)[:80], style="dim"), Text(one_line(state))
        )
        for name, description, word in one.tools:
            table.add_row(Text(f"  {one_line(name)}"), Text(one_line(description)[:_DESCRIBED]), Text(word))
    return table
