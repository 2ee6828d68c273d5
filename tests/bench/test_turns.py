"""What a run does with slow engines and failures, and what it shows meanwhile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from m7mlx_bench import progress, rounds, worker
from m7mlx_bench.report import Results
from m7mlx_bench.rounds import Turns
from m7mlx_bench.worker import Job, find_pace, measure

from m7mlx.errors import DownloadError, RunError

JOB = Job("slow", "model", [34, 256], [1024, 4096], tokens=24, vocab=1000, seconds=30)


class Clock:
    """A clock that only engines move."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now

    perf_counter = time


class Slow:
    """An engine that takes `step` seconds a token, and cannot be filled but by reading."""

    clock = Clock()
    step = 1.0
    moved_bytes = 10

    def __init__(self, folder: Path, length: int) -> None:
        self.length = length
        self.most = 0

    def read(self, ids: Sequence[int]) -> None:
        self.clock.now += self.step * len(ids)
        self.most = max(self.most, len(ids))
        assert len(ids) <= self.length

    def fill(self, position: int) -> None:
        raise NotImplementedError

    def tokens(self) -> Iterator[int]:
        while True:
            self.clock.now += self.step
            yield 5

    def kv_bytes(self) -> int:
        return 100


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    class Engine(Slow):
        clock = Clock()

    monkeypatch.setattr(worker, "time", Engine.clock)
    monkeypatch.setattr("m7mlx_bench.engines.ENGINES", {"slow": Engine})
    return Engine


def measured(step: float, slow: type[Slow], told: list[str]) -> tuple[dict[str, Any], float]:
    """What an engine finds at so many seconds a token; and how long all of it took."""
    slow.step, slow.clock.now = step, 0.0
    job = replace(JOB, pace=find_pace(JOB, told.append))
    slow.clock.now = 0.0
    return measure(job, told.append), slow.clock.now


def test_a_fast_engine_is_measured_with_all_tokens(slow: type[Slow]) -> None:
    told: list[str] = []
    found, _ = measured(0.001, slow, told)
    assert found["cut"] == []
    assert found["first_s"] == pytest.approx(0.035)
    assert found["tokens"] == [5] * 16
    assert found["prefill"] == {34: pytest.approx(1000), 256: pytest.approx(1000)}
    assert set(found["decode"]) == {34, 1024, 4096}
    assert found["kv"] == {1024: 100, 4096: 100}
    assert told[:2] == ["loading", "reading 4 tokens"]
    assert "going to position 1,024" in told and "decoding at 4,096" in told


def test_a_slow_engine_makes_do_with_fewer_tokens(slow: type[Slow]) -> None:
    """At five seconds a token, a whole job would take over half an hour."""
    found, seconds = measured(5, slow, [])
    assert found["first_s"] is None and found["tokens"] == []
    assert found["prefill"] == {34: pytest.approx(0.2), 256: pytest.approx(0.2)}
    assert found["decode"] == {34: pytest.approx(5000)}  # no position was near enough to read up to
    assert found["cut"] == [
        "no start to first token",
        "prefill of 34 with 5",
        "prefill of 256 with 6",
        "decode at 34 with 7",
    ]
    assert seconds < 5 * (30 + 5)


def test_a_position_is_read_up_to_where_that_is_quick_enough(slow: type[Slow]) -> None:
    found, _ = measured(0.02, slow, [])
    assert set(found["decode"]) == {34, 1024}


def run_of(cut: list[str], positions: Sequence[int] = (1024, 4096)) -> str:
    places = {str(n): 1.0 for n in positions}
    return json.dumps({"tokens": [1], "decode": places, "kv": places, "prefill": {}, "cut": cut})


def test_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    run: list[str] = []

    def answer(job: str, show: Any) -> str:
        given = json.loads(job)
        if given is None:
            return "1e10"
        if given["engine"] == "broken":
            raise RunError("no such kernel")
        if given["pace"] is None:
            return "50.0"
        assert given["pace"] == 50
        show("decoding at 34")
        run.append(given["engine"])
        return run_of([], [1024]) if given["engine"] == "mlx-lm" else run_of(["prefill of 34 with 6"])

    def absent() -> tuple[Path, str]:
        raise DownloadError("no network")

    monkeypatch.setattr(rounds, "run_worker", answer)
    results = Results({"name": "x", "window": 4096}, {}, [34], [1024, 4096], 24)
    turns = Turns(results, JOB, shown.append)
    (tmp_path / "model.gguf").write_bytes(b"x")
    turns.add("mlx-lm", lambda: (tmp_path, "reads a copy"))
    turns.add("llama.cpp", lambda: (tmp_path / "model.gguf", ""))
    turns.add("broken", lambda: (tmp_path, ""))
    turns.add("absent", absent)
    turns.measure(3)
    assert run == ["mlx-lm", "llama.cpp", "mlx-lm", "mlx-lm"]
    assert len(results.bandwidth) == 3
    assert results.notes == [
        "mlx-lm reads a copy",
        "broken failed: no such kernel",
        "absent left out: no network",
        "llama.cpp was measured in one round, with fewer tokens where 30 s did not do for all: prefill of 34 with 6",
        "mlx-lm attends to the whole sequence: it ignores the window",
        "mlx-lm gets to a position only by reading, which takes more than 30 s to 4,096",
        "llama.cpp attends to the whole sequence: it ignores the window",
    ]
    assert "round 3 of 3, mlx-lm: decoding at 34" in shown


def test_lines_say_what_is_new_and_that_the_same_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0)
    monkeypatch.setattr(progress, "_STILL", 0.1)
    with progress.show_progress("m7mlx-bench") as show:
        show("writing\x1b[2J 10%")
        show("loading")
        said = ""
        while said.count("loading") < 2:
            time.sleep(0.05)
            said += capsys.readouterr().err
    lines = said.splitlines()
    assert re.fullmatch(r"m7mlx-bench: 0:0\d writing␛\[2J 10%", lines[0])
    assert all(re.fullmatch(r"m7mlx-bench: 0:\d\d loading", line) for line in lines[1:])


def test_lines_are_not_many(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_EVERY", 3600)
    with progress.show_progress("m7mlx-bench") as show:
        for share in range(100):
            show(f"writing {share}%")
    assert capsys.readouterr().err == "m7mlx-bench: 0:00 writing 0%\n"


def test_nothing_is_shown_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.show_progress("m7mlx-bench", is_shown=False) as show:
        show("writing")
    assert capsys.readouterr() == ("", "")


def test_a_worker_tells_what_it_is_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import json; print(json.dumps({'doing': 'loading'}), flush=True); print('noise'); print(7)"
    started = subprocess.Popen

    def start(command: Sequence[str], **options: Any) -> Any:
        return started([sys.executable, "-c", script], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    shown: list[str] = []
    assert rounds.run_worker("null", shown.append).strip() == "7"
    assert shown == ["loading"]
