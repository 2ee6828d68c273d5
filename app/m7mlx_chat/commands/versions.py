"""The versions of a message, and copies of a conversation up to one."""

from __future__ import annotations

from m7mlx_chat.focus import give_focus
from m7mlx_chat.view import ChatView


class VersionCommands(ChatView):
    """Going through what was asked and answered in the place of a message; forking."""

    async def action_sibling(self, direction: int) -> None:
        """Show the next version (1) of the selected message, or the one before (-1)."""
        if (selected := self.selected) is not None:
            await self._show_sibling(selected.message.id, direction, select=True)

    async def action_sibling_of(self, message: int, direction: int) -> None:
        """Show another version of a message that was clicked on."""
        await self._show_sibling(message, direction, select=False)

    async def _show_sibling(self, message: int, direction: int, *, select: bool) -> None:
        if message not in self.session.line:  # a click that came late
            return
        place = self.session.line.index(message)
        self.session.switch(message, direction)
        await self.transcript.sync(at=self.session.line[min(place, len(self.session.line) - 1)], select=select)
        self.show_seen()

    async def action_fork(self) -> None:
        if self.session.line:
            await self._fork(self.session.line[-1])

    async def action_fork_message(self) -> None:
        if (selected := self.selected) is not None:
            await self._fork(selected.message.id)

    async def _fork(self, message: int) -> None:
        self.session.fork(message)
        give_focus(self.composer)
        await self.show_all()
        self.tell("a new conversation, with all up to here")
