"""Ctrl-C while a command starts: exit status 130 and nothing on stderr.

It does not matter what is being imported.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMANDS = ("bench", "chat", "convert", "eval", "plan", "serve")
# As sitecustomize: the process gets SIGINT when it imports a module.
INTERRUPT = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"m7mlx_{name}", *arguments]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "M7MLX_CACHE": str(tmp_path)}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("place", ["cli", "m7mlx", "argparse", "m7mlx.command"])
def test_control_c_while_a_command_is_imported(name: str, place: str, environment: dict[str, str]) -> None:
    environment["INTERRUPTED_AT"] = f"m7mlx_{name}.cli" if place == "cli" else place
    done = subprocess.run(command(name, "--help"), env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("place", ["mlx.core", "numpy", "m7mlx.loading", "m7mlx.tokens.tokenizer_json"])
def test_control_c_while_more_is_imported(place: str, environment: dict[str, str], model_folder: Path) -> None:
    environment["INTERRUPTED_AT"] = place
    asked = command("chat", "--model", str(model_folder), "--no-save", "-p", "Hello", "--max-tokens", "1")
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_process_that_ignores_control_c_goes_on_ignoring_it(environment: dict[str, str]) -> None:
    environment["INTERRUPTED_AT"] = "m7mlx_plan.cli"
    ignore = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command("plan", "--help")]
    done = subprocess.run(ignore, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "usage: m7mlx-plan" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_control_c_at_several_moments(name: str) -> None:
    """Before Python comes to the first line of ours, what it does is its own affair."""
    for seconds in (0.02, 0.05, 0.1, 0.2, 0.4, 0.7):
        with subprocess.Popen(
            command(name, "--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
            out, said = process.communicate(timeout=60)
        if "Traceback" in said:
            assert "m7mlx" not in said, said
        elif process.returncode == 0:  # it was over
            assert out.startswith("usage:") and said == ""
        else:
            assert (process.returncode in (130, -signal.SIGINT), said) == (True, "")
