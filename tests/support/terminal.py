"""Real terminals for tests: tmux, and a pseudo-terminal that keeps every byte."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import time
import uuid
from collections.abc import Callable
from pathlib import Path


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


OURS = re.compile(
    r"\x1b\[[<=>?]?[0-9;:]*[ $]?[@-~]"  # colours, places, modes
    r"|\x1b\]52;c;[A-Za-z0-9+/=]*\x07"  # a copy
    r"|\x1b\]22;[a-z-]*\x07"  # the pointer's shape
    r"|\x1b\]0;[^\x00-\x1f\x7f-\x9f]*\x07"  # the title
    r"|\x1b[=>78]"
)


def on_terminal(
    command: list[str],
    size: tuple[int, int] = (130, 40),
    cwd: Path | None = None,
    **environment: str,
) -> str:
    """All that a program writes to the terminal that it runs in."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    values = os.environ | {"TERM": "xterm-256color"} | environment
    written = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=values, cwd=cwd) as process:
        os.close(theirs)
        try:
            while data := os.read(ours, 65536):
                written += data
        except OSError:  # Linux says so where the other side has gone
            pass
        process.wait(60)
    os.close(ours)
    return written.decode("utf-8", "surrogateescape")
