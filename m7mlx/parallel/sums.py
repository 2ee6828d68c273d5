"""Products whose inputs are divided among ranks: all add up what each has multiplied."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from m7mlx.model import Mistral


def sum_products(model: Mistral, size: int, group: mx.distributed.Group) -> None:
    """Make `o_proj` and `down_proj` of a shard give what those of the whole model give."""
    for block in model.model.layers:
        for parent, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
            parent[name] = _summed(parent[name], size, group)


def _summed(layer: nn.Linear | nn.QuantizedLinear, size: int, group: mx.distributed.Group) -> nn.Module:
    """Return a layer that multiplies by this rank's columns and adds up the results of all ranks.

    MLX's `shard_linear` makes such a layer from a whole matrix; here only the share has been read.
    """
    summed: nn.Module
    if isinstance(layer, nn.QuantizedLinear):
        rows, columns = layer.scales.shape
        summed = nn.QuantizedShardedToAllLinear(
            columns * layer.group_size * size,
            rows,
            bias=False,
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
            group=group,
        )
    else:
        rows, columns = layer.weight.shape
        summed = nn.ShardedToAllLinear(columns * size, rows, bias=False, group=group)
    for name, array in layer.parameters().items():  # what the constructor has drawn is never computed
        summed[name] = array
    return summed
