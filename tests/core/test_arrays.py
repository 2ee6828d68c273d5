"""Bytes of arrays, whatever their type and however they lie in memory."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from m7mlx import arrays
from m7mlx.arrays import is_finite, raw_bytes, softmax, swiglu

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.integers(0, 39),
    st.sampled_from([0.0, 1.5, -60000.0, "nan", "inf", "-inf"]),
)
@settings(max_examples=examples(50), deadline=None)
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


LARGE = (40, 1000)


@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0, 1e4])
def test_softmax_of_large_arrays(spread: float) -> None:
    """Compare with NumPy in float64.

    Among the numbers are those that have no power left, and −∞ for what is not to be seen.
    """
    x = (np.random.default_rng(0).standard_normal(LARGE) * spread).astype(np.float32)
    x[:, ::7] = -np.inf
    x[0, 1:], x[0, 0] = -np.inf, 5
    powers, total = softmax(mx.array(x))
    assert total is not None  # the way for large arrays
    found = np.array(powers / total).astype(np.float64)
    expected = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-29)
    assert softmax(mx.array(x[:2]))[1] is None


def test_swiglu_of_large_arrays() -> None:
    rng = np.random.default_rng(0)
    gate, up = (rng.standard_normal(LARGE).astype(np.float32) * scale for scale in (20, 1))
    gate[0, :6] = [-1e4, 1e4, 0, -88, 88, -300]
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    for cut in (slice(None), slice(0, 3)):  # the way for large arrays, and MLX's
        found = np.array(swiglu(mx.array(gate[cut]), mx.array(up[cut])))
        np.testing.assert_allclose(found, expected[cut], rtol=1e-5, atol=1e-20)


def test_what_is_no_number_stays_none() -> None:
    x = mx.zeros(LARGE)
    x[3, 5] = mx.nan
    powers, total = softmax(x)
    assert total is not None
    assert mx.isnan((powers / total)[3]).all().item()
    assert not mx.isnan((powers / total)[:3]).any().item()
    assert mx.isnan(swiglu(x, x)[3, 5]).item()
