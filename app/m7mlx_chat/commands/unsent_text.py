"""The text in the composer: written in $EDITOR, or brought back from what was asked before."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path

from textual.app import SuspendNotSupported

from m7mlx_chat.screens.dialogs import Search
from m7mlx_chat.unsent import UnsentText
from m7mlx_chat.view import ChatView


class UnsentTextCommands(ChatView):
    """What fills the composer."""

    def action_history(self) -> None:
        def take(text: str | None) -> None:
            if text is not None:
                self.drafts.clear()
                self.composer.recall(text)

        self.push_screen(Search("What was asked before", lambda text: self.store.prompts(text, limit=100)), take)

    def action_editor(self) -> None:
        """Let the user write the unsent text in an editor of their own."""
        editor = self.environment.editor
        with tempfile.TemporaryDirectory(prefix="m7mlx-") as folder:
            path = Path(folder) / "message.md"
            path.write_text(self.composer.unsent.message(), encoding="utf-8")
            try:
                with self.suspend():
                    status = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode
                text = path.read_text(encoding="utf-8", errors="replace")
            except SuspendNotSupported:
                self.tell("an editor cannot be opened in this terminal", is_error=True)
            except (OSError, ValueError) as error:
                self.tell(f"{editor} cannot be started ({error}); set $EDITOR", is_error=True)
            else:
                if status == 0:
                    self.composer.reset(UnsentText(text.rstrip("\n")))
        self.refresh()
