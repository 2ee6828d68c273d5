"""How hard the tests look: enough for every change, and as hard as `M7MLX_EFFORT` says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

EFFORT = max(1, int(os.environ.get("M7MLX_EFFORT", "1")))
_T = TypeVar("_T")


def examples(count: int) -> int:
    """How many examples hypothesis draws where `count` are enough for a change."""
    return count * EFFORT


def some(values: Sequence[_T], one_in: int, first: int = 0) -> list[_T]:
    """One in `one_in` of the values, from the one at `first` on; all, with that much effort."""
    return list(values) if one_in <= EFFORT else list(values[first % one_in :: one_in])
