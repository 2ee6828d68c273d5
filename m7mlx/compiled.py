"""One token through the model as one compiled function: traced once, for all positions.

Everything that changes from token to token is an array: the id, the position, the ring's slot, the buffers. MLX then
spends no time on building the graph anew, and joins what it can into single kernels. Whether that pays depends on the
machine, so it is chosen by who has measured it: M7MLX_COMPILE=1 (for `m7mlx-bench` an engine of its own). On Linux's
CPU backend it takes 6 % off a step, but the C++ compiler that MLX starts needs 5 s for the kernels after each boot.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx

from m7mlx.batch import BatchCache
from m7mlx.cache import RollingCache
from m7mlx.ring import LayerRing, Rows

if TYPE_CHECKING:
    from m7mlx.model import Mistral

Step = Callable[[mx.array, RollingCache | BatchCache], mx.array]


def step_of(model: Mistral) -> Step:
    """model(ids [B, 1], cache) → logits [B, 1, vocab_size], in the way that M7MLX_COMPILE asks for."""
    wanted = os.environ.get("M7MLX_COMPILE", "") in ("1", "on") and model.exchange is None
    return CompiledStep(model) if wanted else model.logits


class CompiledStep:
    """The same logits as model(ids, cache) for ids [B, 1]; the cache advances."""

    def __init__(self, model: Mistral) -> None:
        self._model = model
        self._functions: dict[object, Callable[..., tuple[mx.array, list[Rows]]]] = {}

    def __call__(self, ids: mx.array, cache: RollingCache | BatchCache) -> mx.array:
        clock = cache.clock if isinstance(cache, BatchCache) else cache
        if ids.shape[1] != 1 or clock.n_sinks or not clock.rings[0].buffers:
            return self._model.logits(ids, cache)
        clock.bind(self._model.identity, self._model.config)
        clock.begin(1)
        for ring in clock.rings:
            ring.reserve(clock.offset + 1, ring.buffers)
        key = (clock.window, clock.slack, clock.format)
        if key not in self._functions:
            self._functions[key] = mx.compile(self._traced(clock.like()))
        buffers = [ring.buffers for ring in clock.rings]
        logits, written = self._functions[key](ids, mx.array([clock.offset]), clock.starts, buffers)
        # From here on nobody holds the old names of the buffers: the rows are written in place.
        for ring, rows in zip(clock.rings, written, strict=True):
            ring.buffers = rows
        clock.offset += 1
        return logits

    def _traced(self, like: RollingCache) -> Callable[..., tuple[mx.array, list[Rows]]]:
        def function(
            ids: mx.array, offset: mx.array, starts: mx.array, buffers: list[Rows]
        ) -> tuple[mx.array, list[Rows]]:
            rings = [LayerRing(like.window, like.slack, like.format) for _ in buffers]
            for ring, rows in zip(rings, buffers, strict=True):
                ring.buffers = tuple(rows)
            step = like.step_at(offset, starts, rings[0].rows)
            logits = self._model.head(self._model.through(ids, rings, step))
            return logits, [ring.buffers for ring in rings]

        return function
