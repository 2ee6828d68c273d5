"""One token through the model as one compiled function: traced once, for all positions.

Everything that changes from token to token is an array: the id, the position, the ring's slot, the
buffers. MLX then spends no time on building the graph anew, and joins what it can into single
kernels. Whether that pays depends on the machine, so it is chosen by somebody who has measured it:
M7MLX_COMPILE=1 (`m7mlx-bench` has an engine for it). On Linux's CPU backend it takes 6 % off a
step, but the C++ compiler that MLX starts needs 5 s for the kernels after each boot.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from m7mlx.cache import KVCache
from m7mlx.model import Mistral
from m7mlx.positions import Positions
from m7mlx.ring import KVFormat, LayerRing, Stored
from m7mlx.rotation import Tables

_Function = Callable[[mx.array, mx.array, mx.array, list[mx.array], list[Stored]], tuple[mx.array, list[Stored]]]


def step_of(model: Mistral) -> Callable[[mx.array, KVCache], mx.array]:
    """Return a function (ids [B, 1], cache) → logits, compiled if the model asks for it."""
    return CompiledStep(model) if model.compiles_steps and model.exchange is None else model.logits


class CompiledStep:
    """A compiled function in the place of model(ids, cache), for ids [B, 1]."""

    def __init__(self, model: Mistral) -> None:
        self._model = model
        self._functions: dict[tuple[object, Positions, KVFormat, bool], _Function] = {}

    def __call__(self, ids: mx.array, cache: KVCache) -> mx.array:
        if ids.shape[1] != 1 or cache.n_sinks or not cache.rings[0].buffers:
            return self._model.logits(ids, cache)
        cache.bind(self._model.identity, self._model.config)
        cache.begin(1)
        here = cache.positions
        for ring in cache.rings:
            ring.reserve(here.offset + 1, ring.buffers)
        rotation = here.rotation(1)
        tables = [array for array in rotation.tables if array is not None] if rotation.needs_tables else []
        kind = (self._model.identity, here.at(0), cache.format, bool(tables))
        if kind not in self._functions:
            self._functions[kind] = mx.compile(self._traced(here.at(0), [ring.emptied() for ring in cache.rings]))
        buffers = [ring.buffers for ring in cache.rings]
        starts = mx.array(here.starts)[:, None]
        logits, written = self._functions[kind](ids, mx.array([here.offset]), starts, tables, buffers)
        # From here on nobody holds the old names of the buffers: the rows are written in place.
        for ring, stored in zip(cache.rings, written, strict=True):
            ring.buffers = stored
        cache.advance(1)
        return logits

    def _traced(self, positions: Positions, empty: list[LayerRing]) -> _Function:
        def function(
            ids: mx.array,
            offset: mx.array,
            starts: mx.array,
            arrays: list[mx.array],
            buffers: list[Stored],
        ) -> tuple[mx.array, list[Stored]]:
            rings = [ring.emptied() for ring in empty]
            for ring, stored in zip(rings, buffers, strict=True):
                ring.buffers = tuple(stored)
            tables = Tables(arrays[0], arrays[1] if len(arrays) > 1 else None) if arrays else None
            slots = {ring.kind: ring.n_slots for ring in rings}
            forwards = [
                positions.traced_pass(offset, starts, slots.get(kind, 1), span, tables)
                for kind, span in enumerate(positions.spans)
            ]
            logits = self._model.head(self._model.through(ids, [(rings, forwards)]))
            return logits, [ring.buffers for ring in rings]

        return function
