"""What both commands do alike: one line for every failure, and the right status."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Callable

import pytest
from m7mlx_chat.cli import main as chat
from m7mlx_eval.cli import main as evaluate
from m7mlx_serve.cli import main as serve

from m7mlx.command import KV_BITS, KV_BITS_HELP, ArgumentParser, run
from m7mlx.errors import DownloadError, InputError


def outcome(error: BaseException, debug: bool = False) -> int:
    def body(args: argparse.Namespace) -> None:
        raise error

    return run(body, argparse.Namespace(debug=debug), "tool")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("cause;\n mend"), 2, "tool: error: cause; mend\n"),
        (DownloadError("no network"), 1, "tool: error: no network\n"),
        (OSError(errno.ENOSPC, "No space left"), 1, "tool: error: the disk is full\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            1,
            "tool: error: /x: Permission denied\n",
        ),
        (MemoryError(), 1, "tool: error: out of memory\n"),
        (KeyboardInterrupt(), 130, ""),
        (InputError("name \x1b]0;evil\x07 and \u202e"), 2, "tool: error: name ␛]0;evil␇ and ␦\n"),
    ],
    ids=repr,
)
def test_failures_are_one_line_and_a_status(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(error) == status
    assert capsys.readouterr().err == message


def test_debug_shows_the_traceback_and_bugs_always_do() -> None:
    with pytest.raises(InputError):
        outcome(InputError("x"), debug=True)
    with pytest.raises(ZeroDivisionError):
        outcome(ZeroDivisionError())


def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        ArgumentParser("tool", "does things", "examples:").parse_args(["--wrong"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "tool: error: unrecognized arguments: --wrong (see tool --help)\n"


@pytest.mark.parametrize("command", [chat, serve, evaluate])
def test_bits_of_keys_and_values_are_the_same_choice_everywhere(
    command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["demo", "--text", "x"] if command is evaluate else []
    for bits in KV_BITS:
        with pytest.raises(SystemExit):
            command([*model, "--kv-bits", str(bits), "--wrong"])
        assert "unrecognized arguments: --wrong" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command([*model, "--kv-bits", "5"])
    assert "--kv-bits: invalid choice: 5 (choose from 4, 8, 16, 32)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(["--help"])
    assert KV_BITS_HELP in " ".join(capsys.readouterr().out.split())
