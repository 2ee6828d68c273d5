"""Messages as they are typed or piped: a line each, or several between marks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from m7mlx.errors import InputError
from m7mlx.terminal import visible
from m7mlx_chat.completing import commands, paths
from m7mlx_chat.plain.writing import Written

try:
    import readline
except ImportError:  # a Python without it: lines are typed as the terminal has them
    _editor: ModuleType | None = None
else:
    _editor = readline

_PROMPT, _MORE = "> ", "... "
_BLOCK = '"""'
_LONGEST = 1000  # characters of a line that can be brought back


class Lines:
    """Standard input, message by message."""

    def __init__(self, written: Written, asked: Sequence[str]) -> None:
        """`asked` is what was asked before, the newest first: ↑ brings it back."""
        if sys.stdin is None:
            raise InputError("standard input is closed; there is nothing to read")
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
        self._written = written
        self.is_terminal = sys.stdin.isatty()
        # Its own way of writing is for a terminal on both sides.
        self._editor = _editor if self.is_terminal and sys.stdout.isatty() else None
        if self._editor is not None:
            _prepare(self._editor, asked)

    def message(self, prompt: str = _PROMPT) -> str | None:
        r"""Read a message; None at the end of input.

        A line that ends with a backslash goes on in the next one; what stands between two marks of
        three quotes may have any lines. Ctrl-C raises KeyboardInterrupt: what was typed is dropped.
        """
        line = self._line(prompt)
        if line is None:
            return None
        if line.lstrip().startswith(_BLOCK):
            return self._block(line.lstrip().removeprefix(_BLOCK))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            following = self._line(_MORE)
            if following is None:
                break
            lines.append(following)
        text = "\n".join(lines)
        if self._editor is not None and len(lines) == 1:
            self._remember(text)
        return text

    def edited(self, text: str) -> str | None:
        """Let the user change a text of one line; others are typed anew."""
        editor = self._editor
        if editor is None or "\n" in text or visible(text) != text:
            return self.message()
        editor.set_startup_hook(lambda: editor.insert_text(text))
        try:
            return self.message()
        finally:
            editor.set_startup_hook(None)

    def _block(self, first: str) -> str:
        lines: list[str] = []
        line: str | None = first
        while line is not None and not line.rstrip().endswith(_BLOCK):
            lines.append(line)
            line = self._line(_MORE)
        if line is not None:
            lines.append(line.rstrip().removesuffix(_BLOCK))
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        """A line without its end; None at the end of input."""
        if self._editor is not None:
            try:
                return input(prompt)
            except EOFError:
                print(flush=True)
                return None
        if self.is_terminal:
            self._written.prompt(prompt)
        line = sys.stdin.readline()
        if not line:
            if self.is_terminal:
                self._written.prompt("\n")
            return None
        return line.removesuffix("\n").removesuffix("\r")

    def _remember(self, text: str) -> None:
        if self._editor is not None and text.strip():
            self._editor.add_history(text)


def completions(line: str, word: str) -> list[str]:
    """What a word can become, where a `line` has been typed up to its end.

    Names that a terminal would obey, and those with spaces, are left out.
    """
    if line.startswith("/") and " " not in line:
        return [choice.text for choice in commands(line)]
    if word.startswith("@"):
        names = (choice.text for choice in paths(word[1:]))
        return [f"@{name}" for name in names if visible(name) == name and not any(map(str.isspace, name))]
    return []


def _prepare(editor: ModuleType, asked: Sequence[str]) -> None:
    """Set the line editor up: its history is ours, nothing is written to a file of its own."""
    found: list[str] = []

    def complete(word: str, number: int) -> str | None:
        if number == 0:
            found[:] = completions(editor.get_line_buffer()[: editor.get_endidx()], word)
        return found[number] if number < len(found) else None

    editor.set_auto_history(False)
    editor.clear_history()
    for text in reversed(asked):
        if len(text) <= _LONGEST and "\n" not in text and visible(text) == text:
            editor.add_history(text)
    editor.set_completer(complete)
    editor.set_completer_delims(" \t\n")
    # macOS's Python has BSD's editor under this name, which has its own way to bind a key.
    is_bsd = "libedit" in (editor.__doc__ or "")
    editor.parse_and_bind("bind ^I rl_complete" if is_bsd else "tab: complete")
