"""What strangers may send, for some seconds: benchmarks/fuzz.py, without its bound of latency."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("fuzz")


def test_strangers_break_nothing_and_leave_nothing_open(fuzz: Any, model_folder: Path) -> None:
    with fuzz.serving(model_folder, "--rows", "4") as (url, process):
        found: dict[str, float] = {}
        with fuzz.watching(url, found):
            tally = asyncio.run(fuzz.fuzz(url, 6, 6.0, seed=5))
        assert tally.wrong == []
        assert tally.ended["proper", 200] > 3 and tally.ended["bodies", 400] > 0
        assert asyncio.run(fuzz.settled(url)) == 0
        assert fuzz.memory(process) < 600
    assert found["asked"] > 10 and found["lost"] == 0 and 0 < found["p99"] <= found["most"]
