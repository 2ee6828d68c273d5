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
from m7mlx_chat.attach import attached, takes_long
from m7mlx_chat.completing import Choice, FilesBelow, commands, paths
from m7mlx_chat.focus import give_focus
from m7mlx_chat.store.rows import Role
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
        self._files = FilesBelow()
        self._reading: set[str] = set()  # what stands for files that are being read

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

    def show_editing(self, what: Role | None) -> None:
        """Show what the text takes the place of: a question of the user's, or an answer."""
        self.set_class(what is not None, "-editing")
        name = {"user": "a question", "assistant": "an answer"}
        self.border_title = f"editing {name[what]} · Esc leaves it as it is" if what else ""

    def recall(self, text: str) -> None:
        """Put a text in the place of the unsent one, to edit and send it again."""
        self.reset(folded(text))
        give_focus(self)

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
            if any(placeholder in self.text for placeholder in self._reading):
                self.app.notify("a file is being read; press Enter when it is there")
            else:
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
            typed = found[1]
            if self._files.is_stale():
                self.run_worker(self._read_names, thread=True, group="names", exclusive=True)
            here = paths(typed)
            named = {choice.text for choice in here}
            below = [choice for choice in self._files.like(typed) if choice.text not in named]
            self._completion.open([*here, *below], typed)
        else:
            self._completion.close()

    def _read_names(self) -> None:
        self._files.read()
        self.app.call_from_thread(self._complete)

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
            start -= 1
            if takes_long(choice.text):
                text = self._read_later(choice.text)
            elif (there := self._attached(choice.text)) is not None:
                text = there + " "
            else:
                return
        self._completion.close()
        self.replace(text, (row, start), (row, column), maintain_selection_offset=False)

    # --- files ------------------------------------------------------------------------------------

    def _attached(self, name: str) -> str | None:
        """Keep the text of a file; returns the marker that stands for it, or tells why not."""
        try:
            return self._folded(attached(name), f"file {Path(name).name}")
        except InputError as error:
            self._tell(error)
            return None

    def _read_later(self, name: str) -> str:
        """Begin to read what takes long; returns what stands for it until then."""
        placeholder = f"[reading {visible(Path(name).name)} …]"
        while placeholder in self._reading:
            placeholder = placeholder.replace(" …]", "\N{PRIME} …]")
        self._reading.add(placeholder)
        self.run_worker(lambda: self._read(name, placeholder), thread=True)
        return placeholder + " "

    def _read(self, name: str, placeholder: str) -> None:
        """Read a file in a thread, and put its marker in the place of the placeholder."""
        try:
            content = attached(name)
        except InputError as error:
            self.app.call_from_thread(self._put, placeholder, "")
            self.app.call_from_thread(self._tell, error)
        else:
            kind = "folder" if Path(name).expanduser().is_dir() else "file"
            self.app.call_from_thread(
                lambda: self._put(placeholder, self._folded(content, f"{kind} {Path(name).name}"))
            )

    def _put(self, placeholder: str, marker: str) -> None:
        """Replace a placeholder, wherever it stands by now; it may be gone."""
        self._reading.discard(placeholder)
        for row in range(self.document.line_count):
            column = self.document.get_line(row).find(placeholder)
            if column >= 0:
                self.replace(marker, (row, column), (row, column + len(placeholder)))
                return

    def _tell(self, error: InputError) -> None:
        self.app.notify(visible(str(error)), severity="warning", markup=False)

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
