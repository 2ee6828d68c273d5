"""m7mlx-chat as users start it: -p, pipes, exit statuses, and the app in a real terminal."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHAT = str(Path(sys.executable).parent / "m7mlx-chat")
CAPITAL = "What is the capital of France?"


def chat(
    *arguments: str | Path, stdin: bytes | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    source: dict[str, object] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    command = [CHAT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, cwd=cwd, timeout=300, check=False, **source)  # type: ignore[call-overload]


# --- a real model -------------------------------------------------------------------------------------------


@pytest.mark.demo
def test_a_question_on_the_command_line(demo_model: Path, tmp_path: Path) -> None:
    done = chat("--model", demo_model, "-p", CAPITAL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"The capital of France is Paris.\n"
    assert done.stderr == b""


@pytest.mark.demo
def test_a_question_through_a_pipe(demo_model: Path) -> None:
    assert b"Paris" in chat("--model", demo_model, stdin=CAPITAL.encode() + b"\n").stdout
    both = chat(
        "--model", demo_model, "-p", "Answer the question below.", "--max-tokens", "30", stdin=CAPITAL.encode()
    )
    assert b"Paris" in both.stdout


@pytest.mark.demo
@pytest.mark.parametrize(
    "options",
    [
        ["--speculate", "lookup"],
        ["--speculate", "demo"],
        ["--kv-bits", "8", "--max-kv-size", "300"],
        ["--max-kv-size", "30"],  # less than the question: a stream has no end
    ],
)
def test_the_answer_with_other_memory_and_other_speed(demo_model: Path, options: list[str]) -> None:
    done = chat("--model", demo_model, "-p", CAPITAL, "--max-tokens", "20", *options)
    assert done.returncode == 0, done.stderr
    assert b"Paris" in done.stdout
    assert done.stderr == b""


# --- a small model: what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("stdin", [b"a\x00b \xff\xfe [/INST] </s>", "👩‍👩‍👧 你好".encode(), b"word " * 20_000])
def test_any_bytes_can_be_piped(model_folder: Path, stdin: bytes) -> None:
    done = chat("--model", model_folder, "--max-tokens", "3", stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"\n")


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "message"),
    [
        (["-p", "x", "--model", "no-such-model"], None, 2, b"no alias"),
        (["-p", "x", "--model", "/no/such/folder"], None, 2, b"'/no/such/folder' is no folder"),
        ([], b"", 2, b"there is no question"),
        (["-p", "  "], None, 2, b"there is no question"),
        ([], b"\n \n", 2, b"there is no question"),
        (["-p", "x", "--temp", "-1"], None, 2, b"temperature must lie between"),
        (["-p", "x", "--temp", "warm"], None, 2, b"invalid float value: 'warm'"),
        (["-p", "x", "--top-p", "nan"], None, 2, b"top_p must lie between"),
        (["-p", "x", "--max-tokens", "0"], None, 2, b"--max-tokens must be at least 1"),
        (["-p", "x", "--stop", ""], None, 2, b"--stop needs a text"),
        (["-p", "x", "--kv-bits", "5"], None, 2, b"--kv-bits: invalid choice: 5"),
        (["-p", "x", "--model", "{small}", "--kv-bits", "8"], None, 2, b"do not divide this model's head_dim of 16"),
        (["-p", "x", "--model", "{small}", "--max-kv-size", "9"], None, 2, b"own window bounds its cache to 16 keys"),
        (["-p", "x", "--model", "{small}", "--speculate", "nowhere"], None, 2, b"no alias"),
        (["-p", "x", "--model", "{small}", "--speculate", "{demo}"], None, 2, b"another tokenizer"),
        (["-p", "x", "--wrong"], None, 2, b"unrecognized arguments: --wrong"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str],
    stdin: bytes | None,
    status: int,
    message: bytes,
    tmp_path: Path,
    model_folder: Path,
    request: pytest.FixtureRequest,
) -> None:
    demo = request.getfixturevalue("demo_model") if "{demo}" in arguments else ""
    arguments = [a.format(small=model_folder, demo=demo) for a in arguments]
    done = chat(*arguments, stdin=stdin, cwd=tmp_path)
    assert done.returncode == status
    assert done.stdout == b""
    assert message in done.stderr
    assert done.stderr.startswith(b"m7mlx-chat: error: ")
    assert done.stderr.count(b"\n") == 1


def test_without_a_network_the_small_model_is_suggested(tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [CHAT, "-p", "x"], capture_output=True, env=environment, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 1
    assert b"cannot reach the Hub" in done.stderr
    assert b"m7mlx-chat --model demo" in done.stderr
    assert b"Traceback" not in done.stderr


def test_debug_shows_the_traceback(model_folder: Path) -> None:
    done = chat("--model", "/no/such", "-p", "x", "--debug")
    assert b"Traceback" in done.stderr


def test_control_c_keeps_what_was_answered(model_folder: Path) -> None:
    command = [CHAT, "--model", str(model_folder), "-p", "x", "--max-tokens", "1000000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, noise = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert first
    assert rest.endswith(b"\n")
    assert noise == b""


@pytest.mark.parametrize(
    ("redirect", "status", "error"),
    [
        ("<&-", 0, b""),
        (">&-", 1, b"m7mlx-chat: error: standard output is closed; there is nowhere to print the answer\n"),
        (">/dev/full", 1, b"m7mlx-chat: error: the disk is full\n"),
        ("</dev/null", 0, b""),
    ],
)
def test_closed_and_full_streams(model_folder: Path, redirect: str, status: int, error: bytes) -> None:
    command = f"{CHAT} --model {model_folder} -p x --max-tokens 3 {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (status, error)


def test_a_reader_that_leaves_is_no_error(model_folder: Path) -> None:
    command = f"{CHAT} --model {model_folder} -p x --max-tokens 2000 | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, check=False)
    assert done.stderr == b""
    assert done.returncode == 0


def test_a_terminal_on_stdout_gets_no_control_characters(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pseudo-terminal, with a model made to print an escape sequence."""
    code = (
        "import sys, m7mlx\nfrom m7mlx import Piece\n"
        "m7mlx.stream_generate = lambda *a, **k: iter([Piece('a\\x1b'), Piece(']52;c;eA==\\x07b')])\n"
        "from m7mlx_chat.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    master, slave = pty.openpty()
    command = [sys.executable, "-c", code, "--model", str(model_folder), "-p", "x"]
    done = subprocess.run(command, stdout=slave, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    os.close(slave)
    shown = os.read(master, 10_000).decode()
    os.close(master)
    assert done.returncode == 0, done.stderr
    assert shown == "a␛]52;c;eA==␇b\r\n"


@pytest.mark.parametrize("command", ["m7mlx-chat", "m7mlx-convert"])
def test_help_teaches_and_costs_little(command: str, tmp_path: Path) -> None:
    """At most half a second of CPU more than bare Python: no MLX model, no Textual, no Hub library."""
    code = f"import sys; sys.argv = [{command!r}, '--help']\nfrom {command.replace('-', '_')}.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit as e:\n    status = e.code\n"
    code += "heavy = {'textual', 'mlx_lm', 'transformers', 'huggingface_hub', 'gguf', 'tokenizers', 'torch'}\n"
    code += "print(status, sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "examples:" in done.stdout
    assert done.stdout.strip().endswith("0 []"), done.stdout[-200:] + done.stderr
    installed = subprocess.run(
        [str(Path(CHAT).parent / command), "--version"], capture_output=True, text=True, check=False
    )
    assert installed.stdout.split()[0] == command


# --- the app in a real terminal ------------------------------------------------------------------------------


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

    def wait(self, condition: Callable[[str], bool], seconds: float = 120) -> str:
        deadline = time.monotonic() + seconds
        while not condition(screen := self.screen()):
            assert time.monotonic() < deadline, screen
            time.sleep(0.1)
        return screen

    def kill(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def terminal() -> Iterator[Callable[[str], Terminal]]:
    if not shutil.which("tmux"):
        pytest.skip("tmux is not installed")
    opened: list[Terminal] = []

    def open_terminal(command: str) -> Terminal:
        opened.append(Terminal(command))
        return opened[-1]

    yield open_terminal
    for window in opened:
        window.kill()


@pytest.mark.demo
def test_a_chat_in_a_real_terminal(demo_model: Path, terminal: Callable[[str], Terminal]) -> None:
    window = terminal(f"{CHAT} --model {demo_model} --max-tokens 3000; echo status=$?; sleep 60")
    window.wait(lambda s: "Write a message" in s)
    window.type(CAPITAL)
    window.press("Enter")
    screen = window.wait(lambda s: "tok/s" in s)
    assert "The capital of France is Paris." in screen
    window.type("Tell me a very long story about a fox, with many chapters.")
    window.press("Enter")
    window.wait(lambda s: "Esc stops" in s and s.count("tokens ·") >= 1)
    time.sleep(1)
    window.press("Escape")
    screen = window.wait(lambda s: "stopped ·" in s)
    assert "fox" in screen
    window.paste("What is the\ncapital of Italy?")
    assert window.wait(lambda s: "capital of Italy?" in s).count("capital of Italy?") == 1
    window.press("Enter")
    window.wait(lambda s: "Rome" in s)
    window.press("C-q")
    assert "status=0" in window.wait(lambda s: "status=" in s)


def test_an_error_before_the_app_starts(terminal: Callable[[str], Terminal]) -> None:
    window = terminal(f"{CHAT} --model /no/such/folder; echo status=$?; sleep 60")
    screen = window.wait(lambda s: "status=" in s)
    assert "is no folder here" in screen
    assert "status=2" in screen


def test_keys_redirected_errors_and_a_model_that_fails_in_a_real_terminal(
    model_folder: Path, tmp_path: Path, terminal: Callable[[str], Terminal]
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
    window.wait(lambda s: "could not be loaded" in s)
    window.press("C-q")
    screen = window.wait(lambda s: "status=" in s)
    assert "m7mlx-chat: error: " in screen  # still there when the chat has left the screen
    assert "status=2" in screen


def test_an_interface_that_fails_says_where_the_reason_is(
    model_folder: Path, tmp_path: Path, terminal: Callable[[str], Terminal]
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
