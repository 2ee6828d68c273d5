"""What to do where a conversation has become longer than the model can see at once."""

from __future__ import annotations

from m7mlx_chat.answering import UnderWay
from m7mlx_chat.commands.compare import CompareCommands
from m7mlx_chat.screens.dialogs import Choose
from m7mlx_chat.unsent import folded

_CHARACTERS = 2  # of a token, at the least: so much of the conversation is summed up
_SUMMARY = "Sum up the conversation below in at most 300 words, so that it can be gone on with.\n\n"
_WAYS = {
    "slide": "Go on here: the model keeps the beginning and the latest part in sight, and loses the middle",
    "sum up": "Sum up: a new conversation begins with a summary of this one; your question follows",
    "anew": "Begin anew: your question alone, in a new conversation",
}


class FullCommands(CompareCommands):
    """The ways out of a conversation that is full."""

    def offer_room(self, full: UnderWay, room: int) -> None:
        """Let the user choose how to go on after an answer that found no room for its prompt."""

        async def go_on(way: str | None) -> None:
            if way == "slide":
                await self._slide(full, room)
            elif way is not None:
                await self._move_on(full, room, sums_up=way == "sum up")

        title = f"This conversation is full: the model can see {room:,} tokens at once. How shall it go on?"
        self.push_screen(Choose(title, _WAYS), go_on)

    async def _slide(self, full: UnderWay, room: int) -> None:
        self.session.configure(self.session.settings.changed({"max_kv_size": room}))
        self.load_model()
        self.tell(f"max_kv_size is {room:,} now: F2 changes it")
        if full.begun is not None:
            await self._begin(self.session.resume)
        else:
            await self._begin(lambda: self.session.retry(full.question))

    async def _move_on(self, full: UnderWay, room: int, *, sums_up: bool) -> None:
        question = self.store.message(full.question)
        said = self.store.branch(question.parent) if question.parent is not None else []
        whole = "\n\n".join(f"{'I' if m.role == 'user' else 'You'}: {m.text}" for m in said if m.text)
        self.session.new()
        await self.show_all()
        if sums_up:
            await self._begin(lambda: self.session.ask(_SUMMARY + whole[-room * _CHARACTERS :]))
        self.composer.reset(folded(question.text))
        self.composer.focus()
