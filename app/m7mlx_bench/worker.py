"""One engine in a process of its own: read, decode, fill, decode; one line of JSON on stdout."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

WARM_UP = 3  # tokens
CHECKED = 16  # tokens, that all engines are compared in


@dataclass(frozen=True)
class Job:
    """A measurement to make.

    started  when the process was asked for, in seconds of `time.time`
    """

    engine: str
    folder: str
    prompts: list[int]
    positions: list[int]
    tokens: int
    vocab: int
    started: float = 0.0

    def dumps(self) -> str:
        """Write the job for a process that starts now."""
        return json.dumps(asdict(self) | {"started": time.time()})


def measure(job: Job) -> dict[str, Any]:
    """Measure seconds of the start, tokens per second, milliseconds per token, bytes."""
    from m7mlx_bench.engines import ENGINES

    engine = ENGINES[job.engine](Path(job.folder))
    loaded = time.time() - job.started
    # The start is measured with the shortest prompt; reading it again, once warm, gives prefill.
    shortest = min(job.prompts)
    engine.read(prompt(shortest, job.vocab))
    stream = engine.tokens()
    chosen = [next(stream)]
    found: dict[str, Any] = {"load_s": loaded, "first_s": time.time() - job.started}
    chosen += islice(stream, CHECKED - 1)
    found["tokens"] = chosen
    found["start_rss"] = peak_rss()
    found["prefill"], found["decode"], found["kv"] = {}, {}, {}
    for length in job.prompts:
        began = time.perf_counter()
        engine.read(prompt(length, job.vocab))
        found["prefill"][length] = length / (time.perf_counter() - began)
    for position in job.positions:
        try:
            engine.fill(position)
        except NotImplementedError:
            continue
        found["decode"][position] = step_ms(engine, job.tokens)
        found["kv"][position] = engine.kv_bytes()
    engine.read(prompt(shortest, job.vocab))
    found["decode"][shortest] = step_ms(engine, job.tokens)
    found |= {"rss": peak_rss(), "moved": engine.moved_bytes}
    return found


def step_ms(engine: Any, tokens: int) -> float:
    """Return the median milliseconds from token to token."""
    times = [time.perf_counter() for _ in islice(engine.tokens(), tokens + WARM_UP)][WARM_UP - 1 :]
    return statistics.median(b - a for a, b in pairwise(times)) * 1e3


def prompt(length: int, vocab: int) -> list[int]:
    """Return ids spread over the vocabulary, alike for every engine."""
    return [(i * 7919) % (vocab - 200) + 100 for i in range(length)]


def peak_rss() -> int:
    """Return the most bytes of memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage counts what the parent held when it forked, too
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(bandwidth() if given is None else measure(Job(**given))))
