"""One engine in a process of its own: read, decode, fill, decode.

On stdout, JSON: an object with "doing" whenever it turns to something else, at last the figures.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from m7mlx.units import counted
from m7mlx_bench.engine import Engine

WARM_UP = 3  # tokens
CHECKED = 16  # tokens, that all engines are compared in
_TRIED = 4  # tokens that are read to learn an engine's pace
_LEAST = 3  # tokens to time: the first may have been computed ahead

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A measurement to make.

    length    the most tokens that the engine has to hold
    seconds   what a measurement may take; it makes do with fewer tokens where that is too little
    pace      tokens per second that the engine reads, as found by a job without one, which measures
              nothing else
    started   when the process was asked for, in seconds of `time.time`
    """

    engine: str
    folder: str
    prompts: list[int]
    positions: list[int]
    tokens: int
    vocab: int
    seconds: float = 30.0
    pace: float | None = None
    started: float = 0.0

    @property
    def length(self) -> int:
        """How many tokens the engine has to hold at most."""
        return max(*self.prompts, *self.positions, 0) + WARM_UP + max(self.tokens, CHECKED) + 1

    def dumps(self) -> str:
        """Write the job for a process that starts now."""
        return json.dumps(asdict(self) | {"started": time.time()})


def find_pace(job: Job, tell: Tell) -> float:
    """Return the tokens per second at which an engine reads a few; all else is warm afterwards."""
    from m7mlx_bench.engines import ENGINES

    tell("loading")
    engine = ENGINES[job.engine](Path(job.folder), job.length)
    tell(f"reading {_TRIED} tokens")
    began = time.perf_counter()
    engine.read(prompt(_TRIED, job.vocab))
    pace = _TRIED / (time.perf_counter() - began)
    next(iter(engine.tokens()))
    return pace


def measure(job: Job, tell: Tell) -> dict[str, Any]:
    """Measure seconds of the start, tokens per second, milliseconds per token, bytes.

    "cut" says what was measured with fewer tokens than were asked for.
    """
    from m7mlx_bench.engines import ENGINES

    tell("starting")
    engine = ENGINES[job.engine](Path(job.folder), job.length)
    found: dict[str, Any] = {"load_s": time.time() - job.started, "first_s": None, "tokens": [], "cut": []}
    # The start is measured with the shortest prompt; reading it again, once warm, gives prefill.
    shortest = min(job.prompts)
    fits = shortest if job.pace is None else min(shortest, _fitting(job.pace, job.seconds))
    engine.read(prompt(fits, job.vocab))
    times, chosen = _decode(engine, CHECKED if fits == shortest else 1, job.seconds, time.time)
    if fits == shortest:
        found |= {"first_s": times[0] - job.started, "tokens": chosen}
    else:
        found["cut"].append("no start to first token")
    found["start_rss"] = peak_rss()
    found["prefill"], found["decode"], found["kv"] = {}, {}, {}
    pace = fits / max(times[0] - job.started - found["load_s"], 1e-9)
    for length in job.prompts:
        pace = found["prefill"][length] = _prefill(engine, job, length, pace, tell, found["cut"])
    for position in job.positions:
        if _go_to(engine, job, position, pace, tell, found["cut"]):
            found["decode"][position] = _step_ms(engine, job, position, tell, found["cut"])
            found["kv"][position] = engine.kv_bytes()
    engine.read(prompt(fits, job.vocab))
    found["decode"][shortest] = _step_ms(engine, job, shortest, tell, found["cut"])
    return found | {"rss": peak_rss(), "mapped": mapped_bytes(), "moved": engine.moved_bytes}


def _fitting(pace: float, seconds: float) -> int:
    """Return how many tokens are read in some seconds at a pace; one at the least."""
    return max(1, int(pace * seconds))


def _prefill(engine: Engine, job: Job, length: int, pace: float, tell: Tell, cut: list[str]) -> float:
    """Return the tokens per second at which a prompt is read, or as much of it as time allows."""
    count = min(length, _fitting(pace, job.seconds))
    if count < length:
        cut.append(f"prefill of {length:,} with {count:,}")
    tell(f"reading {counted(count, 'token')}")
    began = time.perf_counter()
    engine.read(prompt(count, job.vocab))
    return count / (time.perf_counter() - began)


def _go_to(engine: Engine, job: Job, position: int, pace: float, tell: Tell, cut: list[str]) -> bool:
    """Have an engine stand at a position, by reading where it takes no keys and values.

    Returns whether it does.
    """
    tell(f"going to position {position:,}")
    try:
        engine.fill(position)
    except NotImplementedError:
        if position > pace * job.seconds:
            return False
        engine.read(prompt(position, job.vocab))
    return True


def _step_ms(engine: Engine, job: Job, position: int, tell: Tell, cut: list[str]) -> float:
    tell(f"decoding at {position:,}")
    found, count = step_ms(engine, job.tokens, job.seconds)
    if count < job.tokens + WARM_UP:
        cut.append(f"decode at {position:,} with {count:,}")
    return found


def step_ms(engine: Engine, tokens: int, seconds: float = math.inf) -> tuple[float, int]:
    """Return the median milliseconds from token to token, and how many were decoded."""
    times, _ = _decode(engine, tokens + WARM_UP, seconds, time.perf_counter)
    skipped = min(WARM_UP - 1, len(times) - 2)
    return statistics.median(b - a for a, b in pairwise(times[skipped:])) * 1e3, len(times)


def _decode(
    engine: Engine,
    count: int,
    seconds: float,
    clock: Callable[[], float],
) -> tuple[list[float], list[int]]:
    """Decode some tokens, fewer if they take too long; return when each came, and all of them."""
    times: list[float] = []
    tokens: list[int] = []
    began = clock()
    for token in engine.tokens():
        times.append(clock())
        tokens.append(token)
        if len(times) >= count or (len(times) >= _LEAST and times[-1] - began > seconds):
            break
    return times, tokens


def prompt(length: int, vocab: int) -> list[int]:
    """Return ids spread over the vocabulary, alike for every engine."""
    return [(i * 7919) % (vocab - 200) + 100 for i in range(length)]


def peak_rss() -> int:
    """Return the most bytes of memory that this process has held, mapped files among them."""
    # On Linux getrusage counts what the parent held when it forked, too.
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mapped_bytes() -> int | None:
    """Return the bytes of mapped files that this process holds; None where nothing tells."""
    return _status("RssFile")


def _status(key: str) -> int | None:
    """Return the bytes that Linux says of this process; None on other systems."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(f"{key}:")[1].split()[0]) * 1024 if status.exists() else None


def bandwidth() -> float:
    """Measure the bytes per second that the device reads from an array that no cache holds."""
    from m7mlx.cpu import blas  # noqa: F401  as in the engines

    # isort: split
    import mlx.core as mx

    from m7mlx.arrays import on_cpu

    seconds = min(_read_by_threads() if on_cpu() else _read_by_device(mx) for _ in range(5))
    return _SIZE / seconds


_SIZE = 1 << 29


def _read_by_device(mx: Any) -> float:
    array = mx.zeros((_SIZE // 4,), mx.float32)
    mx.eval(array)
    began = time.perf_counter()
    mx.eval(mx.max(array))
    return time.perf_counter() - began


def _read_by_threads() -> float:
    """Time NumPy, one thread a core: on a CPU, MLX's own reductions are slower than memory."""
    import numpy as np  # the processes of engines do without it

    workers = os.cpu_count() or 1
    parts = np.array_split(np.ones(_SIZE // 4, np.float32), workers)
    with ThreadPoolExecutor(workers) as pool:
        began = time.perf_counter()
        list(pool.map(np.max, parts))
        return time.perf_counter() - began


def _main(given: dict[str, Any] | None) -> Any:
    if given is None:
        return bandwidth()
    job = Job(**given)
    return find_pace(job, _tell) if job.pace is None else measure(job, _tell)


def _tell(doing: str) -> None:
    print(json.dumps({"doing": doing}), flush=True)


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))))
