"""How rows are stored: formats, what they take, and that nothing is copied before it must be."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import small_config, small_model
from values import number

from m7mlx.decode import prefill
from m7mlx.errors import InputError
from m7mlx.ring import KVFormat, LayerRing

pytestmark = pytest.mark.usefixtures("computed_by")


@given(st.integers(1, 20), st.integers(0, 5), st.integers(0, 100), st.data())
def test_slots_are_positions_modulo_capacity(window: int, slack: int, start: int, data: st.DataObject) -> None:
    ring = LayerRing(window, slack)
    count = data.draw(st.integers(0, ring.capacity))
    runs = ring.slots(start, count)
    slots = [s for run, _ in runs for s in range(run.start, run.stop)]
    sources = [s for _, run in runs for s in range(run.start, run.stop)]
    assert slots == [(start + i) % (window + slack) for i in range(count)]
    assert sources == list(range(count))
    assert len(runs) <= 2


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_decoding_is_the_inverse_up_to_a_step(bits: int, group: int, dtype: mx.Dtype) -> None:
    kv = KVFormat(bits, group)
    x = (mx.random.normal((1, 2, 9, 128), key=mx.random.key(1)) * 3 + 1).astype(dtype)
    encoded = kv.encode(x)
    back = kv.decode(encoded, dtype)
    assert back.dtype == dtype
    assert encoded[1].dtype == encoded[2].dtype
    assert encoded[1].dtype.size == 2
    groups = np.array(x.astype(mx.float32)).reshape(-1, group)
    step = (groups.max(1) - groups.min(1)) / (2**bits - 1)
    rounding = np.abs(groups).max(1) * {mx.float32: 2e-3, mx.float16: 3e-3, mx.bfloat16: 3e-2}[dtype]
    error = np.abs(np.array(back.astype(mx.float32)).reshape(-1, group) - groups).max(1)
    assert (error <= step + rounding).all()  # MLX puts zero onto a code, which moves the others


@pytest.mark.parametrize(("bits", "most"), [(4, 0.29), (8, 0.54)])
def test_quantised_bytes_against_16_bit_ones(bits: int, most: float) -> None:
    model = small_model(small_config(head_dim=64, sliding_window=64))
    sizes = {}
    for kv_bits in (None, bits):
        cache = model.new_cache(kv_bits=kv_bits)
        prefill(model, [i % 97 for i in range(200)], cache, chunk=32)
        sizes[kv_bits] = cache.nbytes
    in_16_bits = sizes[None] / 2  # the model computes in float32
    assert sizes[bits] / in_16_bits <= most


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 224, 288])
def test_products_are_the_same_in_the_basis_of_the_keys(head_dim: int) -> None:
    q, k = (mx.random.normal((1, 2, 5, head_dim), key=mx.random.key(i)) for i in range(2))
    turn = KVFormat(4, 32).turn
    assert mx.allclose(turn(q) @ turn(k).swapaxes(2, 3), q @ k.swapaxes(2, 3), atol=1e-3)
    assert mx.array_equal(KVFormat().turn(q), q)


def test_a_large_channel_does_not_drown_the_others() -> None:
    k = mx.random.normal((1, 1, 64, 128), key=mx.random.key(0))
    k[..., 5] = 60.0
    kv = KVFormat(4, 64)

    def error(x: mx.array) -> float:
        return number(mx.square(kv.decode(kv.encode(x), mx.float32) - x).mean())

    assert error(kv.turn(k)) < error(k) / 4


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (2, 32), (32, 64), (4, 48), (8, 0)])
def test_formats_that_do_not_exist(bits: int, group: int) -> None:
    with pytest.raises(InputError, match="4, 8 or 16 bits"):
        KVFormat(bits, group)


def test_a_write_for_another_number_of_rows_is_refused() -> None:
    model = small_model(small_config())
    cache = model.new_cache()
    model(mx.array([[1, 2], [3, 4]]), cache)
    with pytest.raises(InputError, match="1 rows of ids for a cache of 2"):
        model(mx.array([[5]]), cache)


def active() -> int:
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.mark.parametrize("options", [{}, {"kv_bits": 4, "kv_group_size": 32}])
def test_a_snapshot_costs_nothing_until_the_next_write(options: dict[str, Any]) -> None:
    model = small_model(small_config(head_dim=32, sliding_window=1000))
    cache = model.new_cache(**options)
    prefill(model, [i % 97 for i in range(1500)], cache)
    before = active()
    snapshot = cache.snapshot()
    assert active() == before

    mx.eval(model(mx.array([[1]]), cache), cache.arrays)
    after_write = active() - before
    assert 0.9 * cache.nbytes < after_write < 1.1 * cache.nbytes  # one copy
    for _ in range(5):
        mx.eval(model(mx.array([[1]]), cache), cache.arrays)
    assert active() - before == after_write  # and no more

    cache.restore(snapshot)
    assert active() == before
    del snapshot
    mx.eval(model(mx.array([[1]]), cache), cache.arrays)
    assert active() == before  # nobody else holds it: written in place
