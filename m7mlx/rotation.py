"""Queries and keys are rotated to their positions (arXiv 2104.09864), in MLX.

What is computed of the positions is computed once in a forward pass; all layers share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from m7mlx.arrays import on_cpu
from m7mlx.rope import Rope

# Up to here MLX's own operation is within 0.002 of Hugging Face's angles (measured on a CPU), half
# of what rounding to 16 bits does; beyond, it shows that the two round frequencies differently.
_FAR = 1 << 15


class Tables(NamedTuple):
    """What positions make of queries and keys, for each row, or one for all.

    angles         cosines, then sines of the rotation: float32 [rows, L, head_dim]
    query_factors  what queries are multiplied by besides: float32 [rows, L]; None for nothing
    """

    angles: mx.array
    query_factors: mx.array | None


@dataclass(frozen=True)
class Rotation:
    """The rotation of L tokens.

    offset     position of the first: one for all rows, or [B]
    positions  of all tokens: [rows or 1, L]; None in a pass that is traced
    given      the tables, in a pass that is traced and needs them
    """

    rope: Rope
    offset: int | mx.array
    positions: npt.NDArray[np.int64] | None = None
    given: Tables | None = None

    @cached_property
    def tables(self) -> Tables:
        """What the positions make of queries and keys."""
        if self.given is not None:
            return self.given
        assert self.positions is not None
        factors = self.rope.query_factors(self.positions)
        return Tables(mx.array(self.rope.angles(self.positions)), None if factors is None else mx.array(factors))

    @cached_property
    def needs_tables(self) -> bool:
        """Whether queries and keys are rotated by the tables, not by MLX's own operation.

        On a CPU that operation is a dozen slow ones.
        """
        if self.positions is None:
            return self.given is not None
        return self.rope.scaling is not None or on_cpu() or bool(self.positions[:, -1].max() >= _FAR)

    def rotate(self, x: mx.array) -> mx.array:  # [B, heads, L, head_dim]
        """Rotate queries or keys."""
        if self.needs_tables:
            return self.rotate_by_tables(x)
        theta = self.rope.theta
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=theta, scale=1.0, offset=self.offset)

    def rotate_by_tables(self, x: mx.array) -> mx.array:  # [B, heads, L, head_dim]
        """Rotate queries or keys to any positions, following each other or not."""
        if x.shape[2] == 1 and on_cpu():
            return (x.swapaxes(1, 2) @ self._matrices).swapaxes(1, 2).astype(x.dtype)  # one product for all heads
        cosines, sines = mx.split(self.tables.angles[:, None], 2, axis=-1)
        a, b = mx.split(x, 2, axis=-1)
        return mx.concatenate([a * cosines - b * sines, a * sines + b * cosines], axis=-1).astype(x.dtype)

    def scale_queries(self, queries: mx.array) -> mx.array:  # [B, heads, L, head_dim]
        """Multiply queries by what their positions make of them besides the rotation."""
        if self.rope.scaling is None or not self.rope.scaling.query_beta:
            return queries
        factors = self.tables.query_factors
        assert factors is not None
        return (queries * factors[:, None, :, None]).astype(queries.dtype)

    @cached_property
    def _matrices(self) -> mx.array:
        """The rotation of one token as matrices [rows, 1, head_dim, head_dim].

        On a CPU a product with so small a matrix takes less than the operations it stands for.
        """
        cosines, sines = mx.split(self.tables.angles, 2, axis=-1)  # [rows, 1, head_dim / 2]
        units = mx.eye(cosines.shape[-1])
        upper = mx.concatenate([units * cosines, units * sines], axis=-1)
        lower = mx.concatenate([-units * sines, units * cosines], axis=-1)
        return mx.concatenate([upper, lower], axis=-2)[:, None]
