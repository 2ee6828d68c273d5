"""Where the user writes: several lines, long pastes folded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from textual import events
from textual._ansi_sequences import ANSI_SEQUENCES_KEYS
from textual.keys import Keys
from textual.message import Message
from textual.widgets import TextArea

from m7mlx_chat.terminal import visible

_FOLD_CHARS, _FOLD_LINES = 4_000, 40
_NEW_LINE = ("ctrl+j", "alt+enter", "shift+enter", "shift+\r")  # the last: xterm's way of telling Shift+Enter
# Alt+Enter as most terminals send it. Textual drops the Alt, and Enter would send the message.
cast(dict[str, Any], ANSI_SEQUENCES_KEYS)["\x1b\r"] = (Keys.ControlJ,)


@dataclass(frozen=True)
class Draft:
    """A message as it stands in the composer: each long paste as one short line, its marker."""

    shown: str = ""
    pastes: Mapping[str, str] = field(default_factory=dict)

    def message(self) -> str:
        """What is sent: all pastes unfolded; what looks like a marker inside a paste stays what it is."""
        text = self.shown
        if self.pastes:
            text = re.sub("|".join(map(re.escape, self.pastes)), lambda match: self.pastes[match[0]], text)
        return text.lstrip("\n").rstrip()  # the first line keeps its indentation: it may be code


class Composer(TextArea):
    """A text area in which Enter sends.

    A long paste is shown as one short line, so that neither the screen nor the editing slows down, and is put
    in its place again when the message is sent.
    """

    class Submitted(Message):
        """The user sends `draft`."""

        def __init__(self, draft: Draft) -> None:
            super().__init__()
            self.draft = draft

    def __init__(self) -> None:
        super().__init__(id="composer", placeholder="Write a message …", soft_wrap=True, highlight_cursor_line=False)
        self._pastes: dict[str, str] = {}

    @property
    def draft(self) -> Draft:
        return Draft(self.text, dict(self._pastes))

    def reset(self, draft: Draft | None = None) -> None:
        """Start over, with `draft` to edit."""
        draft = draft or Draft()
        self._pastes = dict(draft.pastes)
        self.load_text(draft.shown)
        self.move_cursor(self.document.end)

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.stop()
            event.prevent_default()
            self.post_message(self.Submitted(self.draft))
        elif event.key in _NEW_LINE:
            event.stop()
            event.prevent_default()
            self.insert("\n")
        # Other keys: Textual calls the base class's handler itself, after this one.

    async def _on_paste(self, event: events.Paste) -> None:
        event.stop()
        event.prevent_default()
        text = event.text.replace("\r\n", "\n").replace("\r", "\n")  # terminals paste a return for each line end
        lines = text.count("\n") + 1
        if len(text) >= _FOLD_CHARS or lines >= _FOLD_LINES:
            marker = f"[pasted text {len(self._pastes) + 1}: {len(text):,} characters, {lines:,} lines]"
            self._pastes[marker] = text
            text = marker
        self.replace(visible(text), *self.selection, maintain_selection_offset=False)
