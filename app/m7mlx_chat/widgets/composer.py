"""Where the user writes: long pastes and files are folded, commands and names completed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import regex
from textual import events, on
from textual.message import Message
from textual.widgets import TextArea

from m7mlx.errors import InputError
from m7mlx.terminal import visible
from m7mlx_chat.completing import Choice, commands, paths
from m7mlx_chat.files import attached
from m7mlx_chat.textual_internals import read_alt_enter_as_ctrl_j
from m7mlx_chat.unsent import UnsentText, folded, is_long, marker_of
from m7mlx_chat.widgets.completion import Completion

_MENTION = re.compile(r"(?:^|\s)@(\S*)$")
# the last: xterm's way of telling Shift+Enter
_NEW_LINE = ("ctrl+j", "alt+enter", "shift+enter", "shift+\r")
read_alt_enter_as_ctrl_j()  # as Enter it would send the message


class Composer(TextArea):
    """A text area in which Enter sends, and that completes commands and file names.

    A long paste or a file is shown as one short line, so that neither the screen nor the editing
    slows down, and is put in its place again when the message is sent.
    """

    DEFAULT_CSS = """
    Composer {
        height: auto; min-height: 3; max-height: 12; margin: 0 1; padding: 0 1;
        border: round $primary 40%; background: $background;
    }
    Composer:focus { border: round $primary; }
    Composer.-editing { border: round $warning; border-title-color: $warning; }
    """

    class Submitted(Message):
        """The user sends what was `unsent`."""

        def __init__(self, unsent: UnsentText) -> None:
            super().__init__()
            self.unsent = unsent

    def __init__(self, completion: Completion, asked: Callable[[], Sequence[UnsentText]]) -> None:
        """`asked` gives what was asked before, the newest first."""
        super().__init__(id="composer", placeholder="Write a message …", soft_wrap=True, highlight_cursor_line=False)
        self._pastes: dict[str, str] = {}
        self._completion = completion
        self._asked = asked
        self._history: list[UnsentText] = []
        self._back = 0  # how far back in the history; 0: the unsent text
        self._kept = UnsentText()

    @property
    def unsent(self) -> UnsentText:
        """The unsent text that stands in the composer."""
        text = self.text
        return UnsentText(text, {marker: paste for marker, paste in self._pastes.items() if marker in text})

    @property
    def aside(self) -> UnsentText | None:
        """The draft that has made room for what was asked before, if that is shown."""
        return self._kept if self._back else None

    @property
    def draft(self) -> UnsentText:
        """What the user has written: what was merely brought back is not it."""
        is_as_it_was = self._back and self.text == self._history[self._back - 1].shown
        return self._kept if is_as_it_was else self.unsent

    def load(self, unsent: UnsentText) -> None:
        """Show another unsent text. What was there before is not there to be undone."""
        self._back = 0
        self._pastes = dict(unsent.pastes)
        self.load_text(unsent.shown)
        self.move_cursor(self.document.end)

    def reset(self, unsent: UnsentText | None = None) -> None:
        """Start over, with an unsent text to edit; Ctrl+Z brings back what was there."""
        self._back = 0
        self._fill(unsent or UnsentText())

    def show_editing(self, is_editing: bool) -> None:
        """Show whether the text takes the place of a question."""
        self.set_class(is_editing, "-editing")
        self.border_title = "editing a question · Esc leaves it as it is" if is_editing else ""

    def recall(self, text: str) -> None:
        """Put a text in the place of the unsent one, to edit and send it again."""
        self.reset(folded(text))
        self.focus()

    def _fill(self, unsent: UnsentText) -> None:
        self._pastes |= unsent.pastes  # the others may come back, too
        self.history.checkpoint()
        self.replace(unsent.shown, self.document.start, self.document.end, maintain_selection_offset=False)
        self.history.checkpoint()
        self.move_cursor(self.document.end)

    async def _on_key(self, event: events.Key) -> None:
        if self._takes(event.key):
            event.stop()
            event.prevent_default()
        # Other keys: Textual calls the base class's handler itself, after this one.

    def _takes(self, key: str) -> bool:
        """Do what a key stands for, if it is one of ours; return whether it is."""
        if self._completion.is_open and key in ("tab", "enter"):
            # for all that has been typed: who types fast is ahead of the message that it changed
            self._complete()
        completing = self._completion.is_open
        if completing and key in ("up", "down"):
            self._completion.move(1 if key == "down" else -1)
        elif completing and (key == "tab" or (key == "enter" and not self._completion.is_exact)):
            self._accept(self._completion.chosen)
        elif key == "enter":
            self._completion.close()
            self.post_message(self.Submitted(self.unsent))
        elif key in _NEW_LINE:
            self.insert("\n")
        elif key == "up" and self.cursor_location[0] == 0:
            return self._recall(1)
        elif key == "down" and self.cursor_location[0] == self.document.line_count - 1:
            return self._recall(-1)
        else:
            return False
        return True

    # --- characters as people see them ------------------------------------------------------------

    def get_cursor_left_location(self) -> tuple[int, int]:
        """Where the cursor goes to the left: over all that makes one character together."""
        row, column = self.cursor_location
        clusters = regex.findall(r"\X", self.document.get_line(row)[:column])
        return (row, column - len(clusters[-1])) if clusters else super().get_cursor_left_location()

    def get_cursor_right_location(self) -> tuple[int, int]:
        """Where the cursor goes to the right."""
        row, column = self.cursor_location
        cluster = regex.match(r"\X", self.document.get_line(row), pos=column)
        return (row, cluster.end()) if cluster else super().get_cursor_right_location()

    # --- what was asked before --------------------------------------------------------------------

    def _recall(self, direction: int) -> bool:
        if self._back == 0:
            if direction < 0:
                return False
            self._kept = self.unsent
            self._history = [asked for asked in self._asked() if asked.shown != self._kept.shown]
        back = self._back + direction
        if not 0 <= back <= len(self._history):
            return back > 0
        self._back = back
        self._fill(self._history[back - 1] if back else self._kept)
        self._completion.close()
        return True

    # --- completion -------------------------------------------------------------------------------

    @on(TextArea.Changed)
    def _complete(self) -> None:
        row, column = self.cursor_location
        before = self.document.get_line(row)[:column]
        if self._back:
            return
        if row == 0 and self.document.line_count == 1 and before.startswith("/") and " " not in before:
            self._completion.open(commands(before), before)
        elif found := _MENTION.search(before):
            self._completion.open(paths(found[1]), found[1])
        else:
            self._completion.close()

    def close_completion(self) -> bool:
        """Close the list of choices; return whether it was open."""
        was_open = self._completion.is_open
        self._completion.close()
        return was_open

    def _accept(self, choice: Choice) -> None:
        row, column = self.cursor_location
        start = column - len(self._completion.typed)
        text = choice.text
        if choice.is_file:
            try:
                content = attached(choice.text)
            except InputError as error:
                self.app.notify(visible(str(error)), severity="warning", markup=False)
                return
            start, text = start - 1, self._folded(content, f"file {Path(choice.text).name}") + " "
        self._completion.close()
        self.replace(text, (row, start), (row, column), maintain_selection_offset=False)

    # --- pasting ----------------------------------------------------------------------------------

    async def _on_paste(self, event: events.Paste) -> None:
        event.stop()
        event.prevent_default()
        self.paste(event.text)

    def paste(self, text: str) -> None:
        """Insert a text as it comes from a terminal, folded where it is long."""
        # terminals paste a return for each line end
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if is_long(text):
            text = self._folded(text, f"pasted text {len(self._pastes) + 1}")
        self.replace(visible(text), *self.selection, maintain_selection_offset=False)

    def _folded(self, text: str, name: str) -> str:
        """Keep a text as a paste; returns the marker that stands for it."""
        marker = marker_of(name, text, self._pastes)
        self._pastes[marker] = text
        return marker
