"""--json in every command: one event a line on standard output and nothing else; errors too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TINY = ["--layers", "2", "--hidden", "128", "--feed-forward", "160", "--heads", "2", "--kv-heads", "1"]
TINY += ["--vocab", "400", "--window", "24", "--prompt", "9", "--positions", "16", "--tokens", "2", "--rounds", "1"]
DONE: dict[str, tuple[list[str], list[str], str]] = {  # the command, its last event, and what that must hold
    "chat": (["m7mlx_chat", "-p", "Hi", "--model", "MODEL", "--max-tokens", "3"], ["done"], "text"),
    "convert": (["m7mlx_convert", "MODEL", "--mlx-path", "TMP/out"], ["done"], "folder"),
    "plan of a conversion": (["m7mlx_convert", "MODEL", "--plan"], ["plan"], "target"),
    "verify": (["m7mlx_convert", "verify", "MODEL", "--against", "MODEL", "--tokens", "9"], ["comparison"], "kl"),
    "eval": (["m7mlx_eval", "MODEL", "--text", "TMP/text.txt"], ["result"], "perplexity"),
    "bench": (["m7mlx_bench", *TINY, "--engines", "m7mlx"], ["result"], "runs"),
    "plan": (["m7mlx_plan", "MODEL", "--ranks", "1", "3"], ["estimate"], "mode"),
}
FAILED: dict[str, tuple[list[str], str]] = {
    "chat": (["m7mlx_chat", "-p", "Hi", "--model", "/no/such"], "is no folder here"),
    "chat, in the engine": (["m7mlx_chat", "-p", "x", "--model", "MODEL", "--kv-bits", "8"], "do not divide"),
    "convert": (["m7mlx_convert", "/no/such"], "is no folder here"),
    "verify": (["m7mlx_convert", "verify", "/no/such", "--against", "MODEL"], "is no folder here"),
    "eval": (["m7mlx_eval", "MODEL", "--text", "TMP/none.txt"], "none.txt"),
    "bench": (["m7mlx_bench", "--engines", "vllm"], "there is no engine"),
    "plan": (["m7mlx_plan", "/no/such"], "is not on this machine"),
}


def run(
    command: list[str], model: Path, tmp_path: Path
) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    (tmp_path / "text.txt").write_text("Some words to read. " * 9)
    words = [str(model) if word == "MODEL" else word.replace("TMP", str(tmp_path)) for word in command]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=120,
        check=False,
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(isinstance(event.get("event"), str) for event in events), done.stdout
    return events, done


@pytest.mark.parametrize("name", DONE)
def test_a_result_is_an_event(name: str, model_folder: Path, tmp_path: Path) -> None:
    command, kinds, field = DONE[name]
    events, done = run(command, model_folder, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [event["event"] for event in events][-1:] == kinds
    assert field in events[-1]


@pytest.mark.parametrize("name", FAILED)
def test_a_failure_is_an_event_and_a_line(name: str, model_folder: Path, tmp_path: Path) -> None:
    command, message = FAILED[name]
    events, done = run(command, model_folder, tmp_path)
    assert done.returncode in (1, 2)
    assert [event["event"] for event in events].count("error") == 1
    assert events[-1]["event"] == "error" and message in events[-1]["message"]
    (line,) = done.stderr.splitlines()
    assert ": error: " in line and events[-1]["message"] in line
