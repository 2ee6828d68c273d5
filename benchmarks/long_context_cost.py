"""The cost of a token at growing positions: a part of `long_context.py` in other processes."""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from m7mlx_bench.models import SMALL
from m7mlx_bench.ours import M7
from m7mlx_bench.peers import MlxLm
from m7mlx_bench.worker import WARM_UP, prompt, step_ms

from m7mlx.decode import default_chunk, prefill


class ReadsOn(M7):
    """m7mlx in one sequence that goes on from `read` to `tokens` to `read`, now at `position`."""

    def __init__(self, folder: Path, length: int) -> None:
        super().__init__(folder, length)
        self._cache = self._model.new_cache()

    @property
    def position(self) -> int:
        return self._cache.offset

    def read(self, ids: Sequence[int]) -> None:
        self._logits = prefill(self._model, ids, self._cache, default_chunk(self._model))
        mx.eval(self._logits)


class MlxLmReadsOn(MlxLm):
    """mlx-lm as shipped, the same."""

    def __init__(self, folder: Path, length: int) -> None:
        super().__init__(folder, length)
        self._kept = super()._new_cache()

    def _new_cache(self) -> list[Any]:
        return self._kept

    @property
    def position(self) -> int:
        return int(self._kept[0].offset)


ENGINES: dict[str, type[ReadsOn] | type[MlxLmReadsOn]] = {"m7mlx": ReadsOn, "mlx-lm": MlxLmReadsOn}


def measure(engine: str, folder: Path, positions: Sequence[int], tokens: int) -> list[dict[str, float]]:
    """Measure a token at each position; all before it has been read or decoded."""
    reader = ENGINES[engine](folder, max(positions) + len(positions) * (tokens + WARM_UP))
    found = []
    for position in positions:
        mx.reset_peak_memory()
        count, began = position - reader.position, time.perf_counter()
        reader.read(prompt(count, SMALL.vocab_size))
        read_s = time.perf_counter() - began
        ms, _ = step_ms(reader, tokens)
        found.append(
            {
                "position": position,
                "prefill": count / read_s,
                "ms": ms,
                "kv": reader.kv_bytes(),
                "peak": mx.get_peak_memory(),
                "rss": resident(),
            }
        )
    return found


def resident() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
