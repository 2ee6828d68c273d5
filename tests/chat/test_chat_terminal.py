"""The installed m7mlx-chat in a real terminal (tmux), as a person uses it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from m7mlx_chat.environment import read_environment
from m7mlx_chat.store import Store
from terminal import Terminal

CHAT = str(Path(sys.executable).parent / "m7mlx-chat")
pytestmark = pytest.mark.tmux
CAPITAL = "What is the capital of France?"


@pytest.fixture
def terminal() -> Iterator[Callable[[str], Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(command: str) -> Terminal:
        opened.append(Terminal(command))
        return opened[-1]

    yield open_terminal
    for window in opened:
        window.kill()


@pytest.mark.demo
def test_a_chat_in_a_real_terminal(demo_model: Path, model_folder: Path, terminal: Callable[[str], Terminal]) -> None:
    """Lead a conversation through its whole life.

    Stop, go on, edit, answer again, fork, search, leave, come back.
    """
    window = terminal(f"{CHAT} --model {demo_model} --max-tokens 1000000; echo status=$?; sleep 60")
    window.wait(lambda s: "Write a message" in s and "ready" in s)
    window.type(CAPITAL)
    window.press("Enter")
    screen = window.wait(lambda s: "tok/s · first after" in s)
    assert "The capital of France is Paris." in screen

    window.type("Tell me a very long story about a fox, with many chapters.")
    window.press("Enter")
    window.wait(lambda s: "Esc stops" in s and "tok/s · Esc" in s)
    window.press("Escape")
    assert "fox" in window.wait(lambda s: "stopped ·" in s)
    window.type("/continue")
    window.press("Enter")
    window.wait(lambda s: "tok/s · Esc" in s and "stopped ·" not in s)
    window.press("Escape")
    window.wait(lambda s: "stopped ·" in s)

    window.type("/edit")
    window.press("Enter")
    window.wait(lambda s: "editing a question" in s)
    window.press("C-c")  # the old text
    window.paste("What is the\ncapital of Italy?")
    window.press("Enter")
    window.wait(lambda s: "Rome" in s and "2/2" in s and "ready" in s)
    window.press("M-Up")
    window.type("r")
    window.wait(lambda s: s.count("2/2") == 2 and "Rome" in s and "ready" in s)
    window.press("Escape")
    time.sleep(0.5)  # an Esc with something right after it would be another key
    window.press("M-Up", "M-Up")
    window.type("[")
    window.wait(lambda s: "fox" in s and "1/2" in s)
    window.type("f")
    window.wait(lambda s: "a new conversation" in s)

    window.press("C-f")
    window.type("capital Italy")
    window.wait(lambda s: "messages found" in s)
    window.press("Enter")
    time.sleep(0.5)
    window.press("Enter")
    window.wait(lambda s: "Rome" in s and "2/2" in s)
    window.type("/model " + str(model_folder))
    window.press("Enter")
    window.wait(lambda s: "/16" in s and "ready" in s)  # its window
    window.type("Say something")
    window.press("Enter")
    window.wait(lambda s: "answering ·" in s)
    window.press("C-q")  # in the middle of it
    assert "status=0" in window.wait(lambda s: "status=" in s)

    window = terminal(f"{CHAT} --continue --model {demo_model}; echo status=$?; sleep 60")
    window.wait(lambda s: "stopped ·" in s and "ready" in s)
    with Store(read_environment().database) as store:
        last, _ = store.conversations()
        texts = [message.text for message in store.branch(last.leaf or 0)]
    assert texts[-2] == "Say something"
    assert texts[2:4] == ["What is the\ncapital of Italy?", "The capital of Italy is Rome."]


def test_a_kill_in_mid_answer_loses_less_than_a_second(
    model_folder: Path,
    terminal: Callable[[str], Terminal],
) -> None:
    window = terminal(f"{CHAT} --model {model_folder} --max-tokens 1000000; echo status=$?; sleep 60")
    window.wait(lambda s: "ready" in s)
    window.type("Tell me")
    window.press("Enter")
    window.wait(lambda s: "tok/s · Esc" in s)
    time.sleep(2.5)
    subprocess.run(["pkill", "-KILL", "-f", f"^[^ ]*python[^ ]* [^ ]*m7mlx-chat --model {model_folder}"], check=True)
    window.wait(lambda s: "status=137" in s)
    with Store(read_environment().database) as store:
        (conversation,) = store.conversations()
        question, answer = store.branch(conversation.leaf or 0)
    assert (question.text, answer.status) == ("Tell me", "interrupted")
    assert len(answer.text) > 100
    window = terminal(f"{CHAT} --model {model_folder} -c; echo status=$?; sleep 60")
    screen = window.wait(lambda s: "interrupted" in s)
    assert re.findall("[A-Za-z]{3,}", answer.text)[-1] in screen


def test_an_error_before_the_app_starts(terminal: Callable[[str], Terminal]) -> None:
    window = terminal(f"{CHAT} --model /no/such/folder; echo status=$?; sleep 60")
    screen = window.wait(lambda s: "status=" in s)
    assert "is no folder here" in screen
    assert "status=2" in screen


def test_keys_redirected_errors_and_a_model_that_fails_in_a_real_terminal(
    model_folder: Path,
    tmp_path: Path,
    terminal: Callable[[str], Terminal],
) -> None:
    window = terminal(f"{CHAT} --model {model_folder} 2>{tmp_path}/errors; echo status=$?; sleep 60")
    window.wait(lambda s: "ready" in s)  # drawn although stderr is a file
    window.type("first")
    window.press("M-Enter")
    time.sleep(0.3)  # Alt+Enter is an Esc with something after it, in time
    window.type("second")
    screen = window.wait(lambda s: "second" in s)
    assert "first" in screen.split("second")[0].splitlines()[-2]
    assert "▌" not in screen  # nothing was sent
    window.press("C-q")
    window.wait(lambda s: "status=0" in s)
    assert (tmp_path / "errors").read_text() == ""

    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken, ignore=shutil.ignore_patterns("config.json"))
    window = terminal(f"{CHAT} --model {broken}; echo status=$?; sleep 60")
    window.wait(lambda s: "config.json" in s and "Which model?" in s)
    window.press("C-q")
    screen = window.wait(lambda s: "status=" in s)
    assert "m7mlx-chat: error: " in screen  # still there when the chat has left the screen
    assert "status=2" in screen


def test_a_piped_question_is_answered_in_the_chat_and_the_chat_stays(
    model_folder: Path,
    terminal: Callable[[str], Terminal],
) -> None:
    window = terminal(
        f"echo piped | {CHAT} --model {model_folder} --max-tokens 3 -i -p first; echo status=$?; sleep 60"
    )
    screen = window.wait(lambda s: "3 tokens" in s)
    assert screen.index("first") < screen.index("piped")
    window.type("second")  # the keyboard is the terminal's, although standard input was a pipe
    window.press("Enter")
    window.wait(lambda s: "3 tokens" in s.partition("second")[2])
    window.press("C-q")
    window.wait(lambda s: "status=0" in s)


def test_an_interface_that_fails_says_where_the_reason_is(
    model_folder: Path,
    tmp_path: Path,
    terminal: Callable[[str], Terminal],
) -> None:
    program = tmp_path / "fails.py"
    program.write_text(
        "import sys\nfrom m7mlx_chat import app, cli\n"
        "def fail(self): raise ValueError('on purpose')\napp.ChatApp.on_mount = fail\n"
        f"sys.exit(cli.main(['--model', {str(model_folder)!r}]))\n"
    )
    window = terminal(f"M7MLX_CACHE={tmp_path} {sys.executable} {program}; echo status=$?; sleep 60")
    screen = window.wait(lambda s: "status=" in s)
    assert "m7mlx-chat: error: the interface failed" in screen
    assert "status=1" in screen
    assert "on purpose" in (tmp_path / "chat.log").read_text()
