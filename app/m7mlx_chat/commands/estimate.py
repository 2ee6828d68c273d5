"""What a message will cost, told before it is sent and while it is read."""

from __future__ import annotations

import asyncio

from textual import on, work

from m7mlx.units import counted
from m7mlx_chat.events import Done, Prefill
from m7mlx_chat.pace import Pace, about
from m7mlx_chat.view import ChatView, Parts
from m7mlx_chat.widgets.composer import Composer

_PAUSE_SECONDS = 0.3  # in typing, after which is counted
_PART = 20_000  # characters to count at a time: nothing else runs meanwhile
_COUNTED = 1_000_000  # characters; of a longer text the rest is taken to be like them
_WORTH_TELLING = 1.0  # seconds


class EstimateCommands(ChatView):
    """Counting what is written, and telling how long reading takes."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.pace = Pace()

    @on(Composer.Changed)
    def _count_later(self) -> None:
        """Count what is written, once nothing more has been typed for a moment."""
        self.composer.border_subtitle = ""
        text = self.composer.unsent.message()
        if text and not text.startswith("/") and self.session.ready is not None:
            self._count(text)
        else:
            self.workers.cancel_group(self, "count")

    @work(group="count", exclusive=True, exit_on_error=False)
    async def _count(self, text: str) -> None:
        await asyncio.sleep(_PAUSE_SECONDS)
        tokens = 0
        for start in range(0, min(len(text), _COUNTED), _PART):
            counted = await asyncio.to_thread(self.engine.count, text[start : min(start + _PART, _COUNTED)])
            if counted is None:
                return
            tokens += counted
        if len(text) > _COUNTED:
            tokens = tokens * len(text) // _COUNTED
        self.composer.border_subtitle = self._cost_of(tokens)

    def _cost_of(self, tokens: int) -> str:
        """What there is to say of a message of so many tokens."""
        to_read = tokens + self.session.unread
        told = f"about {counted(round(tokens, -2), 'token')}" if tokens > _PART else counted(tokens, "token")
        if to_read > tokens:
            told += f", and {to_read - tokens:,} before them to read again"
        seconds = self.pace.seconds(to_read)
        return told if seconds is None or seconds < _WORTH_TELLING else f"{told} · read in {about(seconds)}"

    def left_to_read(self, event: Prefill) -> str:
        """How long the rest of a prompt will take, to follow other words; "" where nobody knows."""
        left = self.pace.left(event.done, event.total)
        return f" · {about(left)} left" if left is not None and left >= _WORTH_TELLING else ""

    def learn_pace(self, done: Done) -> None:
        """Take note of how fast a prompt was read."""
        cost = done.statistics
        self.pace.learn(cost.prompt_tokens - cost.reused_tokens, cost.prompt_tps)
