"""The compiled step: logits and rings as without it, whatever a cache goes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import mixed_config, small_config, small_model, write_folder

from m7mlx.batch import BatchCache
from m7mlx.cache import RollingCache
from m7mlx.compiled import CompiledStep, step_of
from m7mlx.decode import decode, prefill
from m7mlx.loading import load, load_model
from m7mlx.model import Mistral
from m7mlx.positions import Positions
from m7mlx.sampling import Sampler, Sampling

MODEL = small_model(small_config())  # a window of 7
FULL = small_model(small_config(sliding_window=None))
WIDE = small_model(small_config(head_dim=32, sliding_window=9))
MIXED = small_model(mixed_config())


def pair(model: Mistral, **options: Any) -> tuple[RollingCache, RollingCache]:
    first, second = (model.new_cache(**options) for _ in range(2))
    return first, second


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MODEL, {}),
        (MODEL, {"slack": 0}),
        (FULL, {}),
        (WIDE, {"kv_bits": 4, "kv_group_size": 32}),
        (FULL, {"max_kv_size": 12, "sinks": 2}),
        (MIXED, {"slack": 2}),
    ],
)
def test_equal_to_the_plain_step(model: Mistral, options: dict[str, int]) -> None:
    """From an empty cache, across the wrap and across the growth of the buffers at 256 rows."""
    plain, compiled = pair(model, **options)
    step = CompiledStep(model)
    tokens = np.random.default_rng(0).integers(0, 97, 300 if model is FULL else 40).tolist()
    for i, token in enumerate(tokens):
        ids = mx.array([[token]])
        a, b = model(ids, plain), step(ids, compiled)
        np.testing.assert_allclose(np.array(b), np.array(a), rtol=1e-4, atol=1e-4, err_msg=str(i))
    assert (plain.offset, plain.positions.written, plain.max_rollback) == (
        compiled.offset,
        compiled.positions.written,
        compiled.max_rollback,
    )
    assert plain.nbytes == compiled.nbytes


def test_rollback_chunks_and_snapshots_between_compiled_steps() -> None:
    plain, compiled = pair(MODEL, slack=4)
    step = CompiledStep(MODEL)
    for cache, forward in ((plain, MODEL), (compiled, step)):
        prefill(MODEL, [5, 6, 7, 8, 9, 10, 11, 12, 13], cache, 4)
        for token in (1, 2, 3):
            forward(mx.array([[token]]), cache)
        cache.rollback(2)
        kept = cache.snapshot()
        for token in (20, 21, 22, 23, 24):
            forward(mx.array([[token]]), cache)
        cache.restore(kept)
        forward(mx.array([[30]]), cache)
    last = mx.array([[40]])
    np.testing.assert_allclose(np.array(step(last, compiled)), np.array(MODEL(last, plain)), rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_at_their_own_positions() -> None:
    def batch() -> BatchCache:
        caches = [MODEL.new_cache() for _ in range(3)]
        for cache, length in zip(caches, (3, 11, 6), strict=True):
            prefill(MODEL, list(range(length)), cache)
        return BatchCache(caches)

    plain, compiled, step = batch(), batch(), CompiledStep(MODEL)
    for i in range(20):
        ids = mx.array([[i], [i + 1], [i + 2]])
        a, b = MODEL(ids, plain), step(ids, compiled)
        np.testing.assert_allclose(np.array(b), np.array(a), rtol=1e-4, atol=1e-4)
    assert plain.offsets == compiled.offsets


def test_a_single_row_that_began_late() -> None:
    """The longer row has left, and the clock still stands at its time."""
    found = []
    for forward in (MODEL, CompiledStep(MODEL)):
        caches = [MODEL.new_cache() for _ in range(2)]
        for cache, length in zip(caches, (3, 11), strict=True):
            prefill(MODEL, list(range(length)), cache)
        batch = BatchCache(caches)
        batch.keep([0])
        assert batch.positions.starts == (8,)
        found.append(mx.concatenate([forward(mx.array([[i]]), batch) for i in range(12)]))
    np.testing.assert_allclose(np.array(found[1]), np.array(found[0]), rtol=1e-4, atol=1e-4)


def test_one_trace_for_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[Positions] = []
    inner = Positions.traced_pass

    def noted(positions: Positions, *args: Any) -> Any:
        traces.append(positions)
        return inner(positions, *args)

    monkeypatch.setattr(Positions, "traced_pass", noted)
    cache, step = MODEL.new_cache(), CompiledStep(MODEL)
    prefill(MODEL, [1, 2, 3], cache)
    for token in range(30):
        mx.eval(step(mx.array([[token]]), cache))
    assert len(traces) == 1


def test_rows_are_written_in_place() -> None:
    """A ring that is copied for every token would need its memory twice."""
    model = small_model(small_config(sliding_window=20_000))
    cache, step = model.new_cache(), CompiledStep(model)
    for ring in cache.rings:
        k, v = (mx.random.normal((1, 2, 19_000, 16)) for _ in range(2))
        ring.write((k, v), 0)
    cache.positions = cache.positions.at(19_000)
    for token in (1, 2, 3):
        mx.eval(step(mx.array([[token]]), cache), cache.arrays)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for token in (4, 5, 6):
        mx.eval(step(mx.array([[token]]), cache), cache.arrays)
    assert mx.get_peak_memory() - before < cache.nbytes / 3


@pytest.mark.parametrize("asked", ["", "1"])
def test_decoding_takes_the_way_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str) -> None:
    folder = write_folder(tmp_path / "m", small_config(vocab_size=32000, n_layers=1))
    monkeypatch.setenv("M7MLX_COMPILE", asked)
    model = load_model(folder)
    assert isinstance(step_of(model), CompiledStep) == bool(asked)
    assert load(folder)[0].compiles_steps == bool(asked)
    found = []
    for compiles in (model.compiles_steps, False):
        cache, model.compiles_steps = model.new_cache(), compiles
        logits = prefill(model, [3, 1, 4, 1, 5], cache)
        found.append(list(decode(model, logits, cache, Sampler(Sampling(temperature=0)), 30)))
    assert found[0] == found[1]
