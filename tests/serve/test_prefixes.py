"""Ended conversations on disk: they come back after a restart, for their own key alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from processes import piped, running
from serving import NAME, serving, user

KEYS = ["the-first-key-0123456789", "the-other-key-0123456789"]
LONG = "A prompt of an agent, which is long and the same every day. " * 8


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    (tmp_path / "keys").write_text("\n".join(KEYS))
    return ["--api-key-file", str(tmp_path / "keys"), "--prefix-dir", str(tmp_path / "kept"), "--prefix-disk", "1"]


def reused(url: str, text: str, key: str = KEYS[0]) -> tuple[int, int]:
    """How many of a prompt's tokens were held, and how many it has."""
    body = {"model": NAME, "messages": user(text), "max_tokens": 1, "temperature": 0}
    headers = {"Authorization": f"Bearer {key}"}
    usage = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60).json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


@contextmanager
def ended(folder: Path, options: list[str], number: int = signal.SIGTERM) -> Iterator[str]:
    """A server that ends in order, or is killed."""
    with serving(folder, *options) as (url, process):
        yield url
        process.send_signal(number)
        assert process.wait(30) == (0 if number == signal.SIGTERM else -number)


def told(url: str) -> dict[str, float]:
    found = httpx.get(f"{url}/metrics", headers={"x-api-key": KEYS[0]}).text
    return {name: float(value) for name, value in re.findall(r"^(m7mlx_prefix\w+) (\S+)$", found, re.M)}


def test_what_was_read_is_not_read_again_after_a_restart(
    chatml_folder: Path, options: list[str], tmp_path: Path
) -> None:
    with ended(chatml_folder, options) as url:
        assert reused(url, LONG)[0] == 0
        assert reused(url, "Short")[0] < 30
    (file,) = (tmp_path / "kept").iterdir()  # the short one is not worth a file
    assert file.stat().st_mode & 0o777 == 0o600 and (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    with ended(chatml_folder, options) as url:
        held, length = reused(url, LONG, KEYS[1])
        assert held == 0
        held, length = reused(url, LONG)
        assert held == length - 1 and told(url)["m7mlx_prefix_hits"] == 1
        held, longer = reused(url, LONG + "And more.")
        assert length - 20 < held < longer
        assert told(url)["m7mlx_prefix_hits"] == 1  # what is in memory is not loaded
    for path in (tmp_path / "kept").iterdir():  # all are damaged
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with ended(chatml_folder, options) as url:
        assert reused(url, LONG)[0] == 0 and told(url)["m7mlx_prefix_hits"] == 0


def test_a_bounded_conversation_goes_beyond_the_models_context(chatml_folder: Path, options: list[str]) -> None:
    """It is answered, and comes back from the disk; without a bound the prompt is refused."""
    text = LONG * 20  # more than the 8,192 tokens of this model
    with ended(chatml_folder, options) as url, pytest.raises(KeyError):
        reused(url, text)
    for expected in (0, 1):
        with ended(chatml_folder, [*options, "--max-kv-size", "256"]) as url:
            held, length = reused(url, text)
            assert length > 8192 and held == expected * (length - 1)
            assert told(url)["m7mlx_prefix_hits"] == expected


def test_servers_of_tests_write_nothing_into_the_users_cache(
    chatml_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even those that are told nothing of where to keep conversations."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("M7MLX_CACHE", raising=False)
    kept = Path(os.environ["M7MLX_PREFIXES"])
    before = set(kept.iterdir())
    command = [sys.executable, "-m", "m7mlx_serve", "--model", str(chatml_folder), "--name", NAME, "--port", "0"]
    with running(command, stderr=subprocess.PIPE, text=True) as process:
        url = next(found[0] for line in piped(process.stderr) if (found := re.search(r"http://\S+", line)))
        body = {"model": NAME, "messages": user(LONG), "max_tokens": 1}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        process.terminate()
        assert process.wait(30) == 0
    assert len(set(kept.iterdir()) - before) == 1
    assert not list(tmp_path.rglob("*.m7cache*"))


def test_when_it_is_quiet_conversations_are_saved(chatml_folder: Path, options: list[str], tmp_path: Path) -> None:
    """So that a server that is killed has lost little; and none in a folder that is too small."""
    with ended(chatml_folder, options, signal.SIGKILL) as url:
        assert reused(url, LONG)[0] == 0
        until = time.monotonic() + 30
        while told(url)["m7mlx_prefix_files"] != 1:
            assert time.monotonic() < until
            time.sleep(0.1)
    with ended(chatml_folder, options) as url:
        held, length = reused(url, LONG)
        assert held == length - 1
    none = [*options[:-3], str(tmp_path / "none"), "--prefix-disk", "0.000001"]
    with ended(chatml_folder, none) as url:
        reused(url, LONG)
    assert not list((tmp_path / "none").iterdir())
