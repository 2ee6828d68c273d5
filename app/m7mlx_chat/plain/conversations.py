"""The conversations in the line mode: begun, listed, opened, and what is done to one of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from functools import partial

from m7mlx.errors import InputError
from m7mlx.units import counted
from m7mlx_chat.dates import short_time
from m7mlx_chat.plain.models import ModelLines

_LISTED = 20  # conversations and hits
_RECAP = 500  # characters of a message that is told when its conversation is opened


class ConversationLines(ModelLines):
    """The commands for whole conversations."""

    def action_new(self) -> None:
        self.session.new()
        self.written.tell("a new conversation")

    def action_fork(self) -> None:
        if not self.session.line:
            raise InputError("there is nothing to copy yet")
        self.session.fork(self.session.line[-1])
        self.written.tell("a new conversation, with all up to here")

    def action_find(self, argument: str = "") -> None:
        """List the conversations, or what has the text; a number opens one."""
        offered: list[Callable[[], None]] = []
        if argument:
            listed = self.store.titled(argument, _LISTED)
        else:
            pinned = self.store.pinned()
            listed = [*pinned, *(one for one in self.store.conversations(limit=_LISTED) if not one.pinned)][:_LISTED]
        for conversation in listed:
            day = date.fromtimestamp(conversation.updated).isoformat()
            marks = ", ".join(filter(None, [day, "pinned" * conversation.pinned, conversation.hashtags]))
            self._offer(offered, f"{conversation.title} ({marks})", partial(self.open_conversation, conversation.id))
        for hit in self.store.search(argument, _LISTED) if argument else ():
            who = "you" if hit.role == "user" else "model"
            self._offer(offered, f"{hit.title}: {who}: {hit.snippet}", partial(self._open_at, hit.message))
        self.offered = offered
        self.written.tell("A number opens one." if offered else "nothing found")

    def _offer(self, offered: list[Callable[[], None]], text: str, do: Callable[[], None]) -> None:
        offered.append(do)
        self.written.tell(f"{len(offered)}  {text}")

    def open_conversation(self, conversation: int) -> None:
        self.session.open(conversation)
        self._tell_end()

    def _open_at(self, message: int) -> None:
        self.session.show(message)
        self._tell_end()

    def _tell_end(self) -> None:
        """Tell which conversation goes on, and what was said last in it."""
        if self.session.conversation is None:
            return
        head = self.store.conversation(self.session.conversation)
        self.written.tell(f"{head.title} ({counted(len(self.session.line), 'message')})")
        for message in self.store.read(self.session.line[-2:]):
            text = message.text if len(message.text) <= _RECAP else f"{message.text[:_RECAP]} …"
            who, when = "you" if message.role == "user" else "model", short_time(message.said_at)
            self.written.tell(f"{who} ({when}): {text}" if when else f"{who}: {text}")

    def action_rename(self, argument: str = "") -> None:
        self.store.rename(self._shown(), argument)
        self.written.tell(f"title: {self.store.conversation(self._shown()).title}")

    def action_pin(self) -> None:
        is_pinned = not self.store.conversation(self._shown()).pinned
        self.store.pin(self._shown(), is_pinned=is_pinned)
        self.written.tell("pinned: /find lists it first" if is_pinned else "no longer pinned")

    def action_tag(self, argument: str = "") -> None:
        if argument:
            self.store.change_tags(self._shown(), argument)
        self.written.tell(f"tags: {self.store.conversation(self._shown()).hashtags or 'none'}")

    def action_archive(self) -> None:
        if self.store.conversation(self._shown()).archived:
            self.store.unarchive(self._shown())
            self.written.tell("brought back")
        else:
            self.store.archive(self._shown())
            self.written.tell("put away; it is still found")

    def action_delete(self) -> None:
        title = self.session.delete(self._shown())
        self.session.new()
        self.written.tell(f"deleted “{title}”; /undo brings it back")

    def action_undo(self) -> None:
        last = self.store.deleted(limit=1)
        if not last:
            raise InputError("nothing has been deleted")
        self.store.undo_delete(last[0].id)
        self.open_conversation(last[0].id)

    def _shown(self) -> int:
        if self.session.conversation is None:
            raise InputError("the conversation has not begun yet")
        return self.session.conversation
