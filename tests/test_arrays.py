"""Bytes of arrays, whatever their type and however they lie in memory."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m7mlx import arrays
from m7mlx.arrays import is_finite, raw_bytes

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.integers(0, 39),
    st.sampled_from([0.0, 1.5, -60000.0, "nan", "inf", "-inf"]),
)
@settings(max_examples=150, deadline=None)
def test_finite_is_what_mlx_calls_finite(dtype: mx.Dtype, size: int, place: int, value: float | str) -> None:
    numbers = [0.25] * size
    numbers[place % size] = float(value)
    array = mx.array(numbers).astype(dtype)
    assert is_finite(array) == mx.isfinite(array).all().item()


def test_a_bad_number_is_found_in_any_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_PIECE", 7)
    for place in range(50):
        numbers = mx.zeros(50)
        numbers[place] = float("nan")
        assert not is_finite(numbers)
    assert is_finite(mx.zeros(50))
    assert is_finite(mx.zeros((0, 4)))


@pytest.mark.parametrize("dtype", [*DTYPES, mx.uint32])
def test_bytes_are_row_by_row(dtype: mx.Dtype) -> None:
    array = mx.arange(12).reshape(3, 4).astype(dtype)
    turned = array.T
    assert bytes(raw_bytes(turned)) == bytes(raw_bytes(mx.array(turned.tolist(), dtype=dtype)))
    assert len(raw_bytes(array)) == array.nbytes
