"""Plain Python values out of MLX arrays."""

from __future__ import annotations

import mlx.core as mx


def number(array: mx.array) -> float:
    """The one number that an array holds."""
    value = array.item()
    assert isinstance(value, int | float)
    return value
