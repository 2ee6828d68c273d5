"""Sixty-four clients at once, a quarter of whom leave: benchmarks/soak.py, for some seconds."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def soak() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("soak")


def held(process: int) -> tuple[int, int]:
    """Open files and threads."""
    return len(os.listdir(f"/proc/{process}/fd")), len(os.listdir(f"/proc/{process}/task"))


def test_nothing_is_lost_or_crossed_and_nothing_stays(soak: Any, model_folder: Path) -> None:
    asked = soak.questions(model_folder, 10)
    assert {question.kind for question in asked} == {"text", "schema", "tool"}
    with soak.serving(model_folder, "--rows", "16", "--queue", "32") as (url, process):
        asyncio.run(soak.soak(url, asked, 16, 0.1, seed=2))  # threads and caches that stay are there now
        before = held(process) if sys.platform == "linux" else (0, 0)
        tally = asyncio.run(soak.soak(url, asked, 64, 0.5))
        assert not tally.wrong
        assert not tally.failed
        assert tally.ended["answered"] > 20 and tally.ended["left"] > 3
        assert asyncio.run(soak.settled(url)) == 0
        if sys.platform == "linux":
            until = time.monotonic() + 20
            while (after := held(process)) > before and time.monotonic() < until:
                time.sleep(0.1)
            assert after[0] <= before[0] and after[1] <= before[1] + 14  # two pools, of 8 and of 6, never shrink
