"""The notes and progress that a run tells.

Bars and notes for people, one object a line for programs, nothing when quiet.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from m7mlx_convert.cli import main
from m7mlx_convert.progress import Reporter
from models import small_config, write_folder
from processes import running


def test_json_is_one_object_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_folder(tmp_path / "source", small_config(vocab_size=32000))
    assert main([str(source), "--mlx-path", str(tmp_path / "out"), "--json"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    *events, last = map(json.loads, out.splitlines())
    assert last == {"event": "done", "folder": str(tmp_path / "out")}
    for task in ("Converting", "Checking"):
        steps = [event for event in events if event.get("task") == task]
        assert steps[-1]["done"] >= steps[-1]["total"] > 0
        assert [step["done"] for step in steps] == sorted(step["done"] for step in steps)


def test_errors_are_events_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), "--json"]) == 2
    out, error = capsys.readouterr()
    assert json.loads(out)["event"] == "error"
    assert json.loads(out)["message"] in error


def test_quiet_is_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_folder(tmp_path / "source", small_config(vocab_size=32000))
    assert main([str(source), "--mlx-path", str(tmp_path / "out"), "-q"]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'out'}\n", "")


def test_a_terminal_gets_a_bar_and_a_pipe_lines(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", small_config(vocab_size=32000))
    command = [sys.executable, "-m", "m7mlx_convert", str(source), "--mlx-path"]
    piped = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert all(line.startswith(("Converting: ", "Checking: ")) for line in piped.stderr.splitlines())
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    with running([*command, tmp_path / "b"], stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 4096):
                shown += data
        except OSError:  # Linux says so where the other side has gone
            pass
        assert process.wait(60) == 0
    os.close(ours)
    assert b"Converting" in shown
    assert b"Checking" in shown


@pytest.mark.parametrize(("is_terminal", "term"), [(False, "xterm"), (True, "dumb")])
def test_where_no_bar_can_be_drawn_a_line_comes_now_and_then(
    is_terminal: bool,
    term: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setenv("TERM", term)
    now = 0.0
    monkeypatch.setattr("m7mlx_convert.progress.time.monotonic", lambda: now)
    with Reporter("text").task("Converting", 200) as advance:
        for _ in range(50):  # 50 steps of a second
            now += 1.0
            advance(4)
    lines = [f"Converting: {share}%" for share in (20, 40, 60, 80, 100)]
    assert capsys.readouterr() == ("", "\n".join(lines) + "\n")


def test_notes(capsys: pytest.CaptureFixture[str]) -> None:
    for style in ("text", "json", "quiet"):
        Reporter(style).note("so it is")
    out, error = capsys.readouterr()
    assert error == "note: so it is\n"
    assert json.loads(out) == {"event": "note", "text": "so it is"}
