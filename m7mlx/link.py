"""What the ranks of a model that is divided among processes say to each other within a pass (`m7mlx.shard`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from m7mlx.model import Mistral
    from m7mlx.shard import Part


class Link:
    """The place of a rank among the others.

    Every rank runs the same passes in the same order, whatever it has of them, and gets the same logits.
    """

    def __init__(self, part: Part, group: mx.distributed.Group) -> None:
        self._rank, self._size, self._group = part.rank, part.size, group
        self._in_turn = part.mode == "pipeline"

    @property
    def is_first(self) -> bool:
        """Whether its hidden states are made from ids."""
        return not self._in_turn or self._rank == 0

    @property
    def is_last(self) -> bool:
        """Whether its hidden states are those of the whole model."""
        return not self._in_turn or self._rank == self._size - 1

    def receive(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """Hidden states from the rank before."""
        return mx.distributed.recv(list(shape), dtype, self._rank - 1, group=self._group)

    def send(self, hidden: mx.array) -> mx.array:
        """… to the next one; what comes back has been sent once it is evaluated."""
        return mx.distributed.send(hidden, self._rank + 1, group=self._group)

    def from_last(self, hidden: mx.array) -> mx.array:
        """The last rank's hidden states, on all of them."""
        if not self._in_turn:
            return hidden
        return self._from(self._size - 1, hidden)

    def agree(self, tokens: mx.array) -> mx.array:
        """The first rank's tokens. Processors that differ may round differently, and a near tie fall either way."""
        return self._from(0, tokens)

    def _from(self, rank: int, x: mx.array) -> mx.array:
        """One rank's numbers on all. The others add 0, once they have theirs: they take part in the whole pass."""
        if self._rank != rank:
            x = mx.depends([mx.zeros_like(x)], [x])[0]
        return mx.distributed.all_sum(x, group=self._group)


def connect(model: Mistral, part: Part, group: mx.distributed.Group) -> None:
    """Let a rank's model take part in the passes of all."""
    model.link = Link(part, group)
    if part.mode == "tensor":
        for block in model.model.layers:
            for parent, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
                parent[name] = _summed(parent[name], part.size, group)


def _summed(layer: nn.Linear | nn.QuantizedLinear, size: int, group: mx.distributed.Group) -> nn.Module:
    """A product over a rank's share of the columns, added up over all ranks.

    MLX's `shard_linear` makes such a layer of a whole matrix; here only the share has been read.
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
