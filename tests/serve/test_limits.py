"""The memory that the server says keys and values take at most."""

from __future__ import annotations

import mlx.core as mx
import pytest
from m7mlx_serve.limits import Limits, rows_memory
from models import random_weights, small_config

from m7mlx.decode import prefill
from m7mlx.loading import build
from m7mlx.memory import UNDO_SLACK


@pytest.mark.parametrize("kv_bits", [None, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_the_memory_that_is_told_is_what_rows_take(dtype: mx.Dtype, kv_bits: int | None) -> None:
    config = small_config(sliding_window=300, n_layers=1, head_dim=64)
    model = build(config, {name: mx.array(a).astype(dtype) for name, a in random_weights(config).items()})
    cache = model.new_cache(slack=UNDO_SLACK, kv_bits=kv_bits)
    prefill(model, [i % 97 for i in range(400)], cache)
    assert rows_memory(model, Limits(rows=3, queue=0, kept=2, kv_bits=kv_bits)) == 5 * cache.nbytes
