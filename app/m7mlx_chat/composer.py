"""Where the user writes: several lines, long pastes folded."""

from __future__ import annotations

from textual import events
from textual.message import Message
from textual.widgets import TextArea

_FOLD_CHARS, _FOLD_LINES = 4_000, 40
_NEW_LINE = ("ctrl+j", "alt+enter", "shift+enter")


class Composer(TextArea):
    """A text area in which Enter sends.

    A long paste is shown as one short line, so that neither the screen nor the editing slows down, and is put
    in its place again when the message is sent.
    """

    class Submitted(Message):
        """The user sends `text`."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self) -> None:
        super().__init__(id="composer", placeholder="Write a message …", soft_wrap=True, highlight_cursor_line=False)
        self._pastes: dict[str, str] = {}

    def message(self) -> str:
        """The text with all pastes unfolded."""
        text = self.text
        for marker, paste in self._pastes.items():
            text = text.replace(marker, paste)
        return text

    def reset(self, text: str = "") -> None:
        """Start over, with `text` to edit."""
        self._pastes = {}
        self.load_text(text)
        self.move_cursor(self.document.end)

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.stop()
            event.prevent_default()
            self.post_message(self.Submitted(self.message()))
        elif event.key in _NEW_LINE:
            event.stop()
            event.prevent_default()
            self.insert("\n")
        # Other keys: Textual calls the base class's handler itself, after this one.

    async def _on_paste(self, event: events.Paste) -> None:
        lines = event.text.count("\n") + 1
        if len(event.text) < _FOLD_CHARS and lines < _FOLD_LINES:
            return  # the base class's handler comes next
        event.stop()
        event.prevent_default()
        marker = f"[pasted text {len(self._pastes) + 1}: {len(event.text):,} characters, {lines:,} lines]"
        self._pastes[marker] = event.text
        self.insert(marker)
