"""Messages sent during an answer: they wait, are taken back, and have their turn."""

from __future__ import annotations

from m7mlx_chat.focus import give_focus
from m7mlx_chat.unsent import UnsentText
from m7mlx_chat.view import ChatView


class TurnCommands(ChatView):
    """What waits for the answer under way to end."""

    def wait_for_turn(self, unsent: UnsentText) -> None:
        """Let a message wait until the answer under way has ended."""
        self.drafts.wait(unsent)
        self.show_waiting()

    def action_take_back(self) -> None:
        """Put what waits here back into the composer."""
        if self.drafts.take_back():
            self.show_waiting()
            give_focus(self.composer)

    async def next_turn(self) -> None:
        """Ask what has waited longest. What cannot be asked becomes a draft again."""
        turn = self.drafts.turns.first
        if turn is None or self.state in ("answering", "no model"):
            return
        try:
            under_way = self.session.ask_in(turn.place.conversation, turn.unsent.message())
        except Exception:
            self.give_back_turns()
            raise
        self.drafts.turn_taken(under_way.conversation)
        if under_way.conversation == self.session.conversation:
            await self.show_all()
        else:
            self.show_conversations()
            self.show_state()

    def give_back_turns(self) -> None:
        """Make drafts of all that waits: the answer has failed, and the next one might as well."""
        if self.drafts.turns.first is not None:
            self.drafts.give_back()
            self.show_waiting()
            self.tell("what waited for its turn is not sent; it is a draft again")
