"""What to do where a conversation has become longer than the model can see at once."""

from __future__ import annotations

from m7mlx_chat.commands.compare import CompareCommands
from m7mlx_chat.focus import give_focus
from m7mlx_chat.room import WAYS, is_full, summary_request
from m7mlx_chat.screens.dialogs import Choose
from m7mlx_chat.under_way import UnderWay
from m7mlx_chat.unsent import folded


class FullCommands(CompareCommands):
    """The ways out of a conversation that is full."""

    def offer_room(self, full: UnderWay, room: int) -> None:
        """Let the user choose how to go on after an answer that found no room for its prompt."""

        async def go_on(way: str | None) -> None:
            if way == "slide":
                await self._slide(full, room)
            elif way is not None:
                await self._move_on(full, room, sums_up=way == "sum up")

        self.push_screen(Choose(is_full(room), WAYS), go_on)

    async def _slide(self, full: UnderWay, room: int) -> None:
        self.session.configure(self.session.settings.changed({"max_kv_size": room}))
        self.load_model()
        self.tell(f"max_kv_size is {room:,} now: F2 changes it")
        if full.begun is not None:
            await self._begin(self.session.resume)
        else:
            await self._begin(lambda: self.session.retry(full.question))

    async def _move_on(self, full: UnderWay, room: int, *, sums_up: bool) -> None:
        question, summary = self.store.message(full.question), summary_request(self.store, full.question, room)
        self.session.new()
        await self.show_all()
        if sums_up:
            await self._begin(lambda: self.session.ask(summary))
        self.composer.reset(folded(question.text))
        give_focus(self.composer)
