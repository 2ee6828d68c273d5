"""What the processes that share a model exchange within a forward pass (see `m7mlx.shard`)."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from m7mlx.shard import Shard


class Exchange:
    """The exchange of hidden states and tokens between one rank and the others.

    All ranks run the same passes in the same order, each with its own shard, and get the same
    logits.
    """

    def __init__(self, shard: Shard, group: mx.distributed.Group) -> None:
        self._rank, self._size, self._group = shard.rank, shard.size, group
        self._in_turn = shard.mode == "pipeline"

    @property
    def is_first(self) -> bool:
        """Whether this rank makes its hidden states from ids."""
        return not self._in_turn or self._rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank's hidden states are those of the whole model."""
        return not self._in_turn or self._rank == self._size - 1

    def receive(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """Receive hidden states from the previous rank."""
        return mx.distributed.recv(list(shape), dtype, self._rank - 1, group=self._group)

    def send(self, hidden: mx.array) -> mx.array:
        """Send hidden states to the next rank; they have been sent once the result is evaluated."""
        return mx.distributed.send(hidden, self._rank + 1, group=self._group)

    def from_last(self, hidden: mx.array) -> mx.array:
        """Return the last rank's hidden states, on every rank."""
        if not self._in_turn:
            return hidden
        return self._from(self._size - 1, hidden)

    def agree(self, tokens: mx.array) -> mx.array:
        """Return the first rank's tokens, on every rank.

        Processors that differ may round differently, and a near tie may then fall either way.
        """
        return self._from(0, tokens)

    def _from(self, rank: int, x: mx.array) -> mx.array:
        """Return one rank's numbers on every rank.

        The others add zeros, but only once they have numbers of their own, so that they run the
        whole pass.
        """
        if self._rank != rank:
            x = mx.depends([mx.zeros_like(x)], [x])[0]
        return mx.distributed.all_sum(x, group=self._group)
