"""However the chat ends, it gives the terminal back and keeps what was said."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from m7mlx_chat.environment import read_environment
from m7mlx_chat.store import Store

_MODE = re.compile(rb"\x1b\[\?(\d+)([hl])")
_AT_REST = {b"7": b"h", b"25": b"h"}  # lines wrap, the cursor is shown; everything else is off
# A new session with this terminal, and the signals as a shell in the foreground leaves them.
_START = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "[signal.signal(number, signal.SIG_DFL) for number in (1, 2, 15)]; "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Window:
    """A terminal with the chat in it, and all that it has been sent."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.slave = slave
        self.before = termios.tcgetattr(slave)
        self.sent = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *command], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )

    def read(self, until: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, self.sent[-2000:]
            if select.select([self.master], [], [], 0.1)[0]:
                self.sent += os.read(self.master, 65536)

    def wait_for(self, text: bytes) -> None:
        self.read(lambda: text in self.sent)

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def end(self) -> int:
        """The exit status, once all that was sent has been read."""
        self.read(lambda: self.process.poll() is not None)
        self.read(lambda: not select.select([self.master], [], [], 0.1)[0])
        return self.process.returncode

    def is_as_before(self) -> bool:
        modes = dict(_MODE.findall(self.sent))
        modes.pop(b"2048", None)  # a question
        at_rest = all(state == _AT_REST.get(mode, b"l") for mode, state in modes.items())
        taken, given = self.sent.count(b"\x1b[>"), self.sent.count(b"\x1b[<u")
        return {b"1049", b"1003", b"25"} <= set(modes) and at_rest and taken == given and self._keys_as_before()

    def _keys_as_before(self) -> bool:
        return termios.tcgetattr(self.slave)[:4] == self.before[:4]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.master, self.slave):
            try:
                os.close(file)
            except OSError:
                continue


@pytest.fixture
def window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Window]]:
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("TERM_PROGRAM", raising=False)
    opened: list[Window] = []

    def open_window(*command: str) -> Window:
        opened.append(Window(*command))
        return opened[-1]

    yield open_window
    for one in opened:
        one.close()


def chat(model: Path) -> tuple[str, ...]:
    return ("-m", "m7mlx_chat", "--model", str(model), "--max-tokens", "1000000")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_in_mid_answer(model_folder: Path, window: Callable[..., Window], number: signal.Signals) -> None:
    terminal = window(*chat(model_folder))
    terminal.wait_for(b"ready")
    terminal.type(b"Tell me\r")
    terminal.wait_for(b"tok/s")
    terminal.process.send_signal(number)
    assert terminal.end() == 128 + number
    assert terminal.is_as_before()
    with Store(read_environment().database) as store:
        (conversation,) = store.conversations()
        question, answer = store.branch(conversation.leaf or 0)
    assert (question.text, answer.status) == ("Tell me", "stopped")
    assert answer.text


@pytest.mark.parametrize("text", [b"\x1b[?1049h", b"loading the model"])
def test_a_signal_at_the_start(model_folder: Path, window: Callable[..., Window], text: bytes) -> None:
    terminal = window(*chat(model_folder))
    terminal.wait_for(text)
    terminal.process.terminate()
    assert terminal.end() == 128 + signal.SIGTERM
    assert terminal.is_as_before()


def test_a_terminal_that_is_closed(model_folder: Path, window: Callable[..., Window]) -> None:
    terminal = window(*chat(model_folder))
    terminal.wait_for(b"ready")
    terminal.type(b"Tell me\r")
    terminal.wait_for(b"tok/s")
    os.close(terminal.slave)
    os.close(terminal.master)
    assert terminal.process.wait(30) == 128 + signal.SIGHUP
    with Store(read_environment().database) as store:
        (conversation,) = store.conversations()
        assert store.message(conversation.leaf or 0).status in ("stopped", "interrupted")
        assert store.message(conversation.leaf or 0).text


def test_a_loop_of_errors(model_folder: Path, window: Callable[..., Window], tmp_path: Path) -> None:
    program = tmp_path / "loops.py"
    program.write_text(
        "import sys\nfrom m7mlx_chat import cli, view\n"
        "def fail(self): raise ValueError('on purpose')\n"
        "draw = view.Composer.render_line\n"
        "view.Composer.render_line = lambda self, y: fail(self) if self.text else draw(self, y)\n"
        f"sys.exit(cli.main({list(chat(model_folder)[2:])!r}))\n"
    )
    terminal = window(str(program))
    terminal.wait_for(b"F1 help")
    terminal.type(b"x")
    assert terminal.end() == 1
    assert terminal.is_as_before()
    said = terminal.sent[terminal.sent.rindex(b"\x1b[?1049l") :]
    log = tmp_path / "cache" / "chat.log"
    assert f"m7mlx-chat: error: the interface failed; {log} says why\r\n".encode() in said
    assert b"Traceback" not in said
    assert "on purpose" in log.read_text()


def test_keys_that_are_not_utf8(model_folder: Path, window: Callable[..., Window]) -> None:
    terminal = window(*chat(model_folder))
    terminal.wait_for(b"ready")
    random.seed(1)
    for _ in range(20):
        terminal.type(bytes(random.randrange(128, 256) for _ in range(50)))
        terminal.type(b"\x1b[" + bytes(random.randrange(0x20, 0x30) for _ in range(9)) + b"\x1b[M\xff\xff\xff")
    terminal.type(b" still here")
    terminal.wait_for(b"still here")
    terminal.type(b"\x11")  # Ctrl+Q
    assert terminal.end() == 0
    assert terminal.is_as_before()
