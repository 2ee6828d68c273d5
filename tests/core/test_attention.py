"""Attention without a fused kernel, against MLX's fused one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from m7mlx.attention import attend
from m7mlx.positions import window_mask
from m7mlx.ring import KeysValues, KVFormat, Sinks

pytestmark = pytest.mark.usefixtures("computed_by")


@pytest.mark.parametrize("kv_format", [KVFormat(), KVFormat(8, 32), KVFormat(4, 32)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (8, 1)])
def test_attention_where_the_rows_lie(kv_format: KVFormat, batch: int, heads: tuple[int, int]) -> None:
    """Against MLX's fused attention over the unpacked rows, sinks among them."""
    n_heads, n_kv = heads
    q, k, v = (mx.random.normal((batch, h, n, 32)) for h, n in ((n_heads, 5), (n_kv, 9), (n_kv, 9)))
    sinks = Sinks(*(mx.random.normal((batch, n_kv, 2, 32)) for _ in range(2)))
    mask = window_mask(mx.arange(4, 9), mx.arange(9), 4)
    kv = KeysValues(kv_format.encode(k), kv_format.encode(v), kv_format)
    k, v = (kv_format.decode(rows, mx.float32) for rows in (kv.keys, kv.values))
    fused = mx.fast.scaled_dot_product_attention
    assert mx.allclose(attend(q, kv, mask), fused(q, k, v, scale=1.0, mask=mask), atol=1e-4)

    visible = mx.array([[[[False, True]] * 2 + [[True, True]] * 3]])
    both = [mx.concatenate(pair, axis=2) for pair in ([k, sinks.keys], [v, sinks.values])]
    wider = mx.concatenate([mx.broadcast_to(mask, (1, 1, 5, 9)), visible], axis=-1)
    found = attend(q, kv, mask, (q, sinks, visible))
    assert mx.allclose(found, fused(q, *both, scale=1.0, mask=wider), atol=1e-4)


def test_half_precision_stays_half_precision() -> None:
    q = mx.random.normal((1, 4, 1, 32)).astype(mx.float16)
    rows = mx.random.normal((1, 2, 9, 32)).astype(mx.float16)
    kv_format = KVFormat(8, 32)
    kv = KeysValues(kv_format.encode(rows), kv_format.encode(rows), kv_format)
    out = attend(q, kv, mx.ones((1, 9), mx.bool_))
    assert out.dtype == mx.float16
    assert np.isfinite(np.array(out)).all()
