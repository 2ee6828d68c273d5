"""The rolling-buffer cache (paper, section 2 and figure 2): position i lives in slot i mod capacity.

Only the last W keys and values can still be attended to, so the buffer holds W rows plus a small slack and its
memory never grows with the conversation. The slack is what `rollback` can undo, and what lets a few tokens
be written first and attended to in place.

    window 4, slack 1 → capacity 5; after positions 0 … 6:

        slot      0  1  2  3  4
        position  5  6  2  3  4      the next token, 7, goes to slot 2 and sees 4 5 6 7
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from m7mlx.attention import window_mask
from m7mlx.errors import RollbackError

if TYPE_CHECKING:
    from m7mlx.config import ModelConfig

DEFAULT_SLACK = 64
_GROWTH = 256  # rows added at a time until the ring has its full size
_UNBOUNDED = 1 << 30  # capacity of full attention: slot = position


@dataclass(frozen=True)
class Step:
    """What all layers share in one forward pass over positions offset … offset + length − 1.

    `mask` goes to attention as it is: "causal", or bool [length, keys].
    """

    offset: int
    length: int
    mask: mx.array | str
    in_place: bool  # write first and attend to the ring itself; else to the past, gathered in order, and the new


class LayerRing:
    """Keys and values of one layer, each [B, n_kv_heads, rows, head_dim]; slot = position % capacity."""

    def __init__(self, window: int | None, slack: int) -> None:
        self.window = window
        self.capacity = _UNBOUNDED if window is None else window + slack
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def rows(self) -> int:
        """Rows allocated so far: at most `capacity`."""
        return 0 if self.keys is None else self.keys.shape[2]

    def rows_for(self, positions: int) -> int:
        """Rows to allocate so that the positions 0 … positions − 1 have their slots."""
        rows = -(-positions // _GROWTH) * _GROWTH
        if self.window is None:
            return rows
        # From one window on the ring has its final size, so that its memory is the same ever after.
        return self.capacity if rows >= self.window else rows

    def update(self, k: mx.array, v: mx.array, step: Step) -> tuple[mx.array, mx.array]:
        """Store the new keys and values [B, n_kv_heads, length, head_dim]; return those to attend to."""
        if step.in_place:
            self._write(k, v, step.offset)
            assert self.keys is not None and self.values is not None
            return self.keys, self.values
        past_k, past_v = self._past(step.offset)
        keys = mx.concatenate([*past_k, k], axis=2)
        values = mx.concatenate([*past_v, v], axis=2)
        keep = min(step.length, self.capacity)
        self._write(k[:, :, -keep:], v[:, :, -keep:], step.offset + step.length - keep)
        return keys, values

    def _past(self, offset: int) -> tuple[list[mx.array], list[mx.array]]:
        """The keys and values that position `offset` may still see, oldest first, in at most two pieces."""
        first = 0 if self.window is None else max(0, offset - self.window + 1)
        pieces = self._slots(first, offset - first)
        if not pieces:
            return [], []
        assert self.keys is not None and self.values is not None
        return [self.keys[:, :, s] for s, _ in pieces], [self.values[:, :, s] for s, _ in pieces]

    def _write(self, k: mx.array, v: mx.array, start: int) -> None:
        """Write rows for the positions from `start` on; in place where nobody else holds the buffer."""
        self._reserve(start + k.shape[2], like_k=k, like_v=v)
        assert self.keys is not None and self.values is not None
        for slots, source in self._slots(start, k.shape[2]):
            self.keys[:, :, slots] = k[:, :, source]
            self.values[:, :, slots] = v[:, :, source]

    def _slots(self, start: int, count: int) -> list[tuple[slice, slice]]:
        """`count` ≤ capacity positions from `start` on, as runs of slots: (slots, which of the positions)."""
        runs, done = [], 0
        while done < count:
            slot = (start + done) % self.capacity
            run = min(count - done, self.capacity - slot)
            runs.append((slice(slot, slot + run), slice(done, done + run)))
            done += run
        return runs

    def _reserve(self, positions: int, like_k: mx.array, like_v: mx.array) -> None:
        rows = self.rows_for(positions)
        if (missing := rows - self.rows) <= 0:
            return
        B, heads, _, _ = like_k.shape
        more_k = mx.zeros((B, heads, missing, like_k.shape[3]), like_k.dtype)
        more_v = mx.zeros((B, heads, missing, like_v.shape[3]), like_v.dtype)
        self.keys = more_k if self.keys is None else mx.concatenate([self.keys, more_k], axis=2)
        self.values = more_v if self.values is None else mx.concatenate([self.values, more_v], axis=2)


class RollingCache:
    """The keys and values of all layers, and where in the sequence they stand.

    offset  tokens seen; the next token has this position
    ids     the tokens themselves, kept by whoever knows them (`m7mlx.generate`), so that a later prompt can
            tell how much of it is here already; offset == len(ids) where it is complete
    window  keys a token sees, itself included; None for full attention
    slack   tokens that `rollback` can undo once the ring has turned
    """

    def __init__(self, config: ModelConfig, slack: int = DEFAULT_SLACK) -> None:
        if slack < 0:
            raise ValueError(f"slack must not be negative, got {slack}")
        self.window = config.sliding_window
        self.slack = slack
        self.offset = 0
        self.ids: list[int] = []
        self.rings = [LayerRing(self.window, slack) for _ in range(config.n_layers)]
        self._written = 0  # highest position ever written + 1: what a rollback leaves behind in the slots

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers, to be evaluated with the logits: a pending write would keep a whole chunk alive."""
        return [a for ring in self.rings for a in (ring.keys, ring.values) if a is not None]

    def step(self, length: int) -> Step:
        """Describe a forward pass over the next `length` tokens; `advance` ends it."""
        if not self.intact:
            raise RollbackError("a forward pass was broken off and overwrote keys still needed; reset the cache")
        step = self._small_step(length) if length <= self.slack + 1 else self._chunk_step(length)
        # Counted as written before any layer writes: a pass broken off half-way must not go unnoticed.
        self._written = max(self._written, self.offset + length)
        return step

    def advance(self, step: Step) -> None:
        """Count the tokens of a finished forward pass as seen."""
        self.offset = step.offset + step.length

    def _small_step(self, length: int) -> Step:
        """A few tokens: attention reads the ring as it lies, and the mask says which slot is which position."""
        ring = self.rings[0]
        last = self.offset + length - 1
        slots = mx.arange(max(ring.rows, ring.rows_for(last + 1)))
        positions = last - (last - slots) % ring.capacity  # negative where nothing has been written yet
        mask = window_mask(mx.arange(self.offset, last + 1), positions, self.window)
        return Step(self.offset, length, mask, in_place=True)

    def _chunk_step(self, length: int) -> Step:
        """A chunk of a prompt: it would overwrite keys that its own first tokens still need."""
        end = self.offset + length
        if self.window is None or end <= self.window:
            return Step(self.offset, length, "causal", in_place=False)
        first = max(0, self.offset - self.window + 1)
        mask = window_mask(mx.arange(self.offset, end), mx.arange(first, end), self.window)
        return Step(self.offset, length, mask, in_place=False)

    def rollback(self, n: int) -> None:
        """Forget the last `n` tokens, exactly.

        Possible for n up to the slack, and for any n while the ring has not turned yet. Otherwise keys that
        would be seen again have been overwritten: RollbackError, and nothing is changed.
        """
        if n < 0 or n > self.offset:
            raise RollbackError(f"cannot roll back {n} of {self.offset} tokens")
        if n > self.max_rollback:
            raise RollbackError(
                f"cannot roll back {n} tokens: only {self.max_rollback} can still be undone "
                f"(slack {self.slack}); prefill the prompt again"
            )
        self.offset -= n
        del self.ids[self.offset :]

    @property
    def max_rollback(self) -> int:
        """How many tokens `rollback` can undo now."""
        if self._unturned:
            return self.offset
        return max(0, self.slack - (self._written - self.offset))

    @property
    def intact(self) -> bool:
        """False only after a forward pass that was broken off (Ctrl-C, no memory) had overwritten live slots."""
        return self._unturned or self._written - self.offset <= self.slack

    @property
    def _unturned(self) -> bool:
        """Whether no slot has been written twice yet for different positions."""
        return self.window is None or self._written <= self.window + self.slack

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        self.offset = self._written = 0
        self.ids = []
