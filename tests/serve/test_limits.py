"""The memory that the server says keys and values take at most."""

from __future__ import annotations

import mlx.core as mx
import pytest
from m7mlx_serve.limits import Limits, rows_memory
from models import random_weights, small_config

from m7mlx.decode import prefill
from m7mlx.loading import build
from m7mlx.memory import UNDO_SLACK


@pytest.mark.parametrize("window", [300, None])
@pytest.mark.parametrize("kv_bits", [None, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_the_memory_that_is_told_is_what_rows_take(dtype: mx.Dtype, kv_bits: int | None, window: int | None) -> None:
    """Of a model with a window, or of one that is bounded to as much; the sinks lie there, too."""
    config = small_config(sliding_window=window, n_layers=1, head_dim=64)
    limits = Limits(rows=3, queue=0, kept=2, kv_bits=kv_bits, max_kv_size=300)
    assert limits.bound(config) == (None if window else 300)
    model = build(config, {name: mx.array(a).astype(dtype) for name, a in random_weights(config).items()})
    cache = model.new_cache(slack=UNDO_SLACK, kv_bits=kv_bits, max_kv_size=limits.bound(config))
    prefill(model, [i % 97 for i in range(400)], cache)
    sinks = sum(a.nbytes for ring in cache.rings for a in ring.sinks or ())
    assert rows_memory(model, limits) - 5 * cache.nbytes == pytest.approx(0, abs=5 * sinks)


def test_a_bound_fits_every_model() -> None:
    """One that is larger than a model's context keeps all of that."""
    assert Limits(max_kv_size=10**6).bound(small_config(sliding_window=None, max_position_embeddings=128)) == 128
    assert Limits().bound(small_config(sliding_window=None)) is None
