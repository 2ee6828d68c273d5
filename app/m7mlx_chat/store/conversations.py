"""What is done to a whole conversation: settings, title, pin, tags, putting away, deleting."""

from __future__ import annotations

from collections.abc import Sequence

from m7mlx_chat.store.drafts import DraftWriter
from m7mlx_chat.store.rows import CHOSEN_TITLE_LENGTH, changed_tags, encodable, stored_tags, title_of
from m7mlx_chat.store.writer import Values, as_json

_KEEP_DELETED = 30 * 86400  # seconds


class ConversationWriter(DraftWriter):
    """The changes to a conversation that leave its messages alone."""

    def configure(self, conversation: int, *, model: str, system: str, settings: Values) -> None:
        """Keep what the conversation's next answers are to be made with."""
        self._change(
            conversation,
            {"model": encodable(model), "system": encodable(system), "settings": as_json(settings)},
        )

    def rename(self, conversation: int, title: str) -> None:
        """Give a title; an empty one brings the automatic title back."""
        automatic = not title.strip()
        title = self.first_words(conversation) if automatic else title_of(title, CHOSEN_TITLE_LENGTH)
        self._change(conversation, {"title": title, "automatic": automatic})

    def suggest_title(self, conversation: int, title: str) -> None:
        """Give a better automatic title; one that somebody chose stays."""
        with self._writing():
            sql = "UPDATE conversation SET title = ? WHERE id = ? AND automatic"
            self._db.execute(sql, [title_of(title), conversation])

    def archive(self, conversation: int) -> None:
        """Move a conversation out of the way; it is still found."""
        self._change(conversation, {"archived": True})

    def unarchive(self, conversation: int) -> None:
        """Undo `archive`."""
        self._change(conversation, {"archived": False})

    def pin(self, conversation: int, *, is_pinned: bool) -> None:
        """Keep a conversation at the top of the list, or no longer."""
        self._change(conversation, {"pinned": is_pinned})

    def tag(self, conversation: int, tags: Sequence[str]) -> None:
        """Give a conversation these tags, in the place of those before."""
        self._change(conversation, {"tags": stored_tags(tags)})

    def change_tags(self, conversation: int, text: str) -> None:
        """Add the tags of a text to those of a conversation; "-work" takes one away."""
        self.tag(conversation, changed_tags(self.conversation(conversation).tags, text))

    def delete(self, conversation: int) -> None:
        """Hide a conversation; it is erased when the store is opened 30 days later."""
        self._change(conversation, {"deleted_at": self.clock()})

    def undo_delete(self, conversation: int) -> None:
        """Undo `delete`, as long as the conversation has not been erased."""
        self._change(conversation, {"deleted_at": None})

    def _erase_deleted(self) -> None:
        """Erase what was deleted long ago, unless somebody is still answering in it."""
        with self._writing():
            self._db.execute(
                """DELETE FROM conversation WHERE deleted_at < ? AND NOT EXISTS
                (SELECT 1 FROM message m WHERE m.conversation = conversation.id AND m.status = 'answering')""",
                [self.clock() - _KEEP_DELETED],
            )
