"""The tests' own ground: signals, programs, and what is said of skipped tests.

Programs end with the test that started them.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import needs
import pytest
from processes import piped, running

TESTS = Path(__file__).parents[1]
ENDLESS = "import subprocess, sys, time\nprint(subprocess.Popen(['sleep', '1000']).pid, flush=True)\ntime.sleep(1000)"


@pytest.mark.parametrize("shell", ["trap '' INT TERM; {}", "{} & wait $!"])
def test_signals_reach_programs_whatever_started_the_tests(shell: str) -> None:
    """A shell's background jobs ignore Ctrl-C, and so do all that they start."""
    one = f"{TESTS}/chat/test_chat_cli.py::test_control_c_keeps_what_was_answered"
    tests = f"{one} {TESTS}/convert/test_convert_faults.py"
    command = f"{sys.executable} -m pytest -p no:cacheprovider -p no:xdist -k 'control_c or moment' {tests}"
    done = subprocess.run(
        ["sh", "-c", shell.format(command)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_a_program_ends_with_its_test_and_so_does_what_it_has_started() -> None:
    with (
        contextlib.suppress(ZeroDivisionError),
        running([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True) as process,
    ):
        child = int(piped(process.stdout).readline())
        raise ZeroDivisionError
    assert process.returncode == -9
    until = time.monotonic() + 30
    while subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, check=False).stdout.strip(
        b"Z \n"
    ):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_was_skipped_is_said_in_one_line() -> None:
    def report(test: str, reason: str) -> SimpleNamespace:
        return SimpleNamespace(nodeid=test, longrepr=("file.py", 3, f"Skipped: {reason}"))

    told = needs.summary(
        [report("tests/a.py::x", "no tmux"), report("tests/a.py::y", "no tmux"), report("tests/b.py", "no tmux")]
    )
    assert told == "skipped: 2 tests, b.py: no tmux"
    assert needs.summary([]) == ""


def test_what_is_broken_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m7_broken.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not needs._importable("json", "m7_broken")()
    assert not needs._importable("m7_absent")()
    assert needs._importable("json")()
