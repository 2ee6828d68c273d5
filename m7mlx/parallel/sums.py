"""Products whose inputs are divided among ranks: all add up what each has multiplied."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from m7mlx.model import Mistral
from m7mlx.products import project


class Summed(nn.Module):
    """A matrix that holds this rank's columns: its products are added to those of all ranks.

    MLX's `shard_linear` makes such a layer from a whole matrix; here only the share has been read.
    """

    def __init__(self, share: nn.Module, group: mx.distributed.Group) -> None:
        super().__init__()
        self.share, self.group = share, group

    def __call__(self, x: mx.array) -> mx.array:  # [B, L, this rank's inputs] → [B, L, out]
        return mx.distributed.all_sum(project(x, (self.share,)), group=self.group)


def sum_products(model: Mistral, group: mx.distributed.Group) -> None:
    """Make `o_proj` and `down_proj` of a shard give what those of the whole model give."""
    for block in model.model.layers:
        for parent, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
            parent[name] = Summed(parent[name], group)
