"""Copying a message, its code, the whole conversation."""

from __future__ import annotations

from textual import work

from m7mlx.errors import InputError
from m7mlx_chat.clipboard import code_blocks, copy_with_tool
from m7mlx_chat.exporting import code_block, text_to_copy
from m7mlx_chat.store.rows import encodable
from m7mlx_chat.view import ChatView, Parts


class CopyCommands(ChatView):
    """What the user takes elsewhere by the clipboard."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        # message, and which of its code blocks was copied last
        self._copied: tuple[int, int] = (0, 0)

    def action_copy(self, argument: str = "") -> None:
        self.copy_text(*text_to_copy(self.session, argument))

    def action_copy_message(self) -> None:
        if self.selected is not None:
            self.copy_text(self.selected.text, "the message")

    def action_copy_code(self) -> None:
        if self.selected is not None:
            message, block = self._copied
            blocks = code_blocks(self.selected.text)
            number = block % max(1, len(blocks)) + 1 if message == self.selected.message.id else 1
            self._copied = (self.selected.message.id, number)
            try:
                found = code_block(self.selected.text, number)
            except InputError as error:  # a key, not a command: nothing has been asked for wrongly
                self.tell(str(error))
            else:
                self.copy_text(*found)

    def copy_text(self, text: str, what: str = "") -> None:
        """Copy by a tool of the system, and by the terminal (OSC 52; not on macOS's Terminal)."""
        self.copy_to_clipboard(text)
        self._copy_with_tool(text)
        self.tell(f"copied {what}".strip())

    def copy_to_clipboard(self, text: str) -> None:
        """Copy by the terminal, which takes UTF-8 alone; a file's name need not be UTF-8."""
        super().copy_to_clipboard(encodable(text))

    @work(thread=True)
    def _copy_with_tool(self, text: str) -> None:
        copy_with_tool(text)
