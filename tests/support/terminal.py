"""A real terminal for tests: tmux."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Callable


class Terminal:
    """A tmux window of its own, typed into and read like a person would."""

    def __init__(self, command: str, size: tuple[int, int] = (100, 30)) -> None:
        self._socket = f"m7mlx-{uuid.uuid4().hex[:8]}"
        self._tmux("new-session", "-d", "-x", str(size[0]), "-y", str(size[1]), command)
        self._tmux("set-option", "-g", "remain-on-exit", "on")

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(["tmux", "-L", self._socket, *arguments], capture_output=True, text=True, check=False)
        return done.stdout

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def paste(self, text: str) -> None:
        self._tmux("set-buffer", text)
        self._tmux("paste-buffer", "-p")  # bracketed, as a terminal does it

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p")

    def wait(self, condition: Callable[[str], bool], seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while not condition(screen := self.screen()):
            assert time.monotonic() < deadline, screen
            time.sleep(0.1)
        return screen

    def kill(self) -> None:
        self._tmux("kill-server")
