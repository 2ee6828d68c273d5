"""The conversations: open, search, rename, pin, tag, put away, delete and bring back."""

from __future__ import annotations

from textual import on
from textual.events import DescendantFocus

from m7mlx.errors import InputError
from m7mlx_chat.focus import give_focus
from m7mlx_chat.screens.dialogs import Ask
from m7mlx_chat.store.rows import tags_of
from m7mlx_chat.view import BESIDE_FROM, ChatView
from m7mlx_chat.widgets.sidebar import Sidebar


class ConversationCommands(ChatView):
    """The list of conversations, and what is done to one of them."""

    # --- going to one -----------------------------------------------------------------------------

    async def action_new(self) -> None:
        self.session.new()
        give_focus(self.composer)
        await self.show_all()

    @on(Sidebar.Chosen)
    async def _chosen(self, event: Sidebar.Chosen) -> None:
        if self.store.conversation(event.conversation).deleted_at is not None:
            self.store.undo_delete(event.conversation)
        await self.open_conversation(event.conversation)
        give_focus(self.composer)

    @on(Sidebar.Found)
    async def _found(self, event: Sidebar.Found) -> None:
        self.session.show(event.message)
        await self.show_all(found=event.message)
        give_focus(self.composer)

    # --- the list ---------------------------------------------------------------------------------

    def action_sidebar(self) -> None:
        self.sidebar.toggle_class("-shown")
        self.show_conversations()
        give_focus(self.sidebar.conversations if self.sidebar.is_shown else self.composer)

    @on(DescendantFocus)
    def _uncover(self, event: DescendantFocus) -> None:
        """Hide the list where it lies over the composer, as soon as that is used."""
        if event.widget is self.composer and self.size.width < BESIDE_FROM:
            self.sidebar.remove_class("-shown")

    def action_find(self, argument: str = "") -> None:
        self.sidebar.add_class("-shown")
        self.show_conversations()
        self.sidebar.search(argument)

    def action_archived(self) -> None:
        self.sidebar.toggle_shelf("put away")

    def action_trash(self) -> None:
        self.sidebar.toggle_shelf("deleted")

    # --- one of them ------------------------------------------------------------------------------

    def action_rename(self, argument: str = "") -> None:
        if self.session.conversation is not None:
            self._rename(self.session.conversation, argument)

    def action_rename_chosen(self) -> None:
        if (chosen := self.sidebar.conversations.chosen) is not None:
            self._rename(chosen, "")

    def _rename(self, conversation: int, title: str) -> None:
        def rename(title: str | None) -> None:
            if title is not None:
                self.store.rename(conversation, title)
                self.show_conversations()

        if title:
            rename(title)
        else:
            before = self.store.conversation(conversation).title
            self.push_screen(Ask("Title (empty: the automatic one)", before), rename)

    def action_pin(self) -> None:
        if self.session.conversation is not None:
            self._pin(self.session.conversation)

    def action_pin_chosen(self) -> None:
        if (chosen := self.sidebar.conversations.chosen) is not None:
            self._pin(chosen)

    def _pin(self, conversation: int) -> None:
        is_pinned = not self.store.conversation(conversation).pinned
        self.store.pin(conversation, is_pinned=is_pinned)
        self.tell("pinned: it stands first in the list" if is_pinned else "no longer pinned")
        self.show_conversations()

    def action_tag(self, argument: str = "") -> None:
        conversation = self.session.conversation
        if conversation is None:
            raise InputError("the conversation has not begun yet")
        if argument:
            self.store.change_tags(conversation, argument)
            self.show_conversations()
            self.tell(f"tags: {self.store.conversation(conversation).hashtags or 'none'}")
        else:
            self._tag(conversation)

    def action_tag_chosen(self) -> None:
        if (chosen := self.sidebar.conversations.chosen) is not None:
            self._tag(chosen)

    def _tag(self, conversation: int) -> None:
        """Let the user write all tags of a conversation."""

        def tag(text: str | None) -> None:
            if text is not None:
                self.store.tag(conversation, tags_of(text))
                self.show_conversations()

        self.push_screen(Ask("Tags, with a space between two", self.store.conversation(conversation).hashtags), tag)

    async def action_archive(self) -> None:
        if self.session.conversation is not None:
            self._archive(self.session.conversation)

    async def action_archive_chosen(self) -> None:
        if (chosen := self.sidebar.conversations.chosen) is not None:
            self._archive(chosen)

    def _archive(self, conversation: int) -> None:
        if self.store.conversation(conversation).archived:
            self.store.unarchive(conversation)
            self.tell("brought back")
        else:
            self.store.archive(conversation)
            self.tell("put away: v in the list shows it; it is still found")
        self.show_conversations()

    async def action_delete(self) -> None:
        if self.session.conversation is not None:
            await self._delete(self.session.conversation)

    async def action_delete_chosen(self) -> None:
        if (chosen := self.sidebar.conversations.chosen) is not None:
            await self._delete(chosen)

    async def _delete(self, conversation: int) -> None:
        under_way = self.session.under_way
        if under_way is not None and under_way.conversation == conversation:
            raise InputError("it is being answered: Esc stops that")
        title = self.session.delete(conversation)
        self.tell(f"deleted “{title}” · /undo brings it back")
        if conversation == self.session.conversation:
            self.session.new()
            await self.show_all()
        self.show_conversations()

    async def action_undo(self) -> None:
        last = self.store.deleted(limit=1)
        if not last:
            self.tell("nothing has been deleted")
            return
        self.store.undo_delete(last[0].id)
        await self.open_conversation(last[0].id)
