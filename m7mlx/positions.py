"""Where tokens stand: their rotation, the keys they see, their slots (paper, section 2).

Position i lies in slot i mod capacity of every layer's ring. A ring of W + slack slots holds all
that a token can see, and the slack is what `rollback` can undo:

    window 4, slack 1 → capacity 5; after positions 0 … 6:

        slot      0  1  2  3  4
        position  5  6  2  3  4      the next token, 7, goes to slot 2 and sees 4 5 6 7

Nothing here holds keys or values: `Positions` is a value, and `ForwardPass` is what it makes of it
for the layers. All layers with the same window share one of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from m7mlx.arrays import on_cpu
from m7mlx.errors import RollbackError

_UNBOUNDED = 1 << 30  # capacity for full attention: slot = position


def capacity_of(window: int | None, slack: int) -> int:
    """Return how many slots a ring has."""
    return _UNBOUNDED if window is None else window + slack


def window_mask(query_positions: mx.array, key_positions: mx.array, window: int | None) -> mx.array:
    """Tell which query may see which key: bool [..., queries, keys].

    Takes positions [..., queries] and [..., keys]. A query at position p sees the `window` keys
    p − window + 1 … p, itself included, as in Hugging Face and vLLM; None is full causal attention.
    A negative key position stands for "no key there".

    With window 3 and positions 0 … 4:

        query 0: 1 0 0 0 0
        query 1: 1 1 0 0 0
        query 2: 1 1 1 0 0
        query 3: 0 1 1 1 0
        query 4: 0 0 1 1 1
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    mask = (distance >= 0) & (key_positions >= 0)[..., None, :]
    return mask if window is None else mask & (distance < window)


def rope(x: mx.array, offset: int | mx.array, theta: float) -> mx.array:
    """Rotate x [B, heads, L, head_dim] to the L positions from `offset` (or offset[row]) on."""
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=theta, scale=1.0, offset=offset)


def rope_each(x: mx.array, positions: mx.array, theta: float) -> mx.array:
    """Rotate x [B, heads, L, head_dim] to any positions [B or 1, L]."""
    B, heads, L, D = x.shape
    tokens = x.swapaxes(1, 2).reshape(B * L, heads, 1, D)
    offsets = mx.broadcast_to(positions, (B, L)).reshape(-1)
    return rope(tokens, offsets, theta).reshape(B, L, heads, D).swapaxes(1, 2)


@cache
def _frequencies(theta: float, head_dim: int) -> npt.NDArray[np.float32]:
    """Return by how much a position turns each pair of numbers: float32 [head_dim / 2]."""
    return (1 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)


def rotation_matrices(offset: int | mx.array, rows: int, theta: float, head_dim: int) -> mx.array:
    """Return what `rope` does to one token, as matrices [rows, 1, head_dim, head_dim].

    The token stands at `offset`, or offset[row]. A rotation is linear: its matrix is the unit
    vectors, rotated. All layers share it. On a CPU `rope` is a dozen operations, and a product with
    so small a matrix takes less than one of them.
    """
    units = mx.broadcast_to(mx.eye(head_dim)[None, :, None], (rows, head_dim, 1, head_dim))
    return rope(units, offset, theta).swapaxes(1, 2)


@dataclass(frozen=True)
class SinkView:
    """How queries see the sinks that the window has left behind.

    Key i of the sinks stays rotated as at position i; instead the query is rotated to a position
    that is never further than max_kv_size − 1: rotary scores depend on the difference alone.

    positions  [B or 1, L], of the queries, relative to the sinks
    visible    bool [B or 1, 1, L, sinks]
    """

    positions: mx.array
    visible: mx.array
    rope_theta: float

    def rotate(self, queries: mx.array) -> mx.array:  # [B, heads, L, head_dim]
        """Rotate queries for the scores of the sinks."""
        return rope_each(queries, self.positions, self.rope_theta)


@dataclass(frozen=True)
class ForwardPass:
    """What all layers with the same window share in one forward pass over L new tokens.

    offset       position of the first new token; in a batch, the time on the rows' clock
    length       L
    first        oldest position that any of the new tokens sees
    in_place     write first and attend to the ring as it lies; otherwise to the keys from `first`
                 on, gathered in order, with the new ones behind them
    starts       when each row began; one for all where they began together
    head_dim     the numbers that are rotated
    make_mask    makes `mask`, which not everything needs
    rope_offset  each row's own position of the first new token: one for all, or [B]
    rope_theta   base of the rotation
    slot         [1], where a compiled pass writes its token, whatever it was traced with
    new_sinks    [B or 1, sinks]: which new token is to be kept as sink i; −1 for none of them
    sinks        how to attend to the sinks; None while they are within the window
    """

    offset: int
    length: int
    first: int
    in_place: bool
    make_mask: Callable[[], mx.array | str]
    rope_offset: int | mx.array
    rope_theta: float
    head_dim: int
    starts: tuple[int, ...] = (0,)
    slot: mx.array | None = None
    new_sinks: mx.array | None = None
    sinks: SinkView | None = None

    @cached_property
    def mask(self) -> mx.array | str:
        """Which query sees which of the keys: "causal", bool [L, keys] or [B, 1, L, keys]."""
        return self.make_mask()

    @cached_property
    def angles(self) -> mx.array:
        """Cosines, then sines of the rotation of each token: float32 [rows, L, head_dim].

        The angles are rounded to float32 as Hugging Face's are: far on, that is what counts.
        """
        rows = np.array(self.starts if any(self.starts) else (0,))
        positions = self.offset - rows[:, None, None] + np.arange(self.length)[:, None]
        angles = positions.astype(np.float32) * _frequencies(self.rope_theta, self.head_dim)
        return mx.array(np.concatenate([np.cos(angles), np.sin(angles)], axis=-1))

    @cached_property
    def rotation(self) -> mx.array | None:
        """What rotates a single token as a matrix, where that is faster (`rotation_matrices`)."""
        if self.length > 1 or not on_cpu():
            return None
        rows = self.rope_offset.size if isinstance(self.rope_offset, mx.array) else 1
        return rotation_matrices(self.rope_offset, rows, self.rope_theta, self.head_dim)

    def rotate(self, x: mx.array) -> mx.array:  # [B, heads, L, head_dim]
        """Rotate queries or keys to their positions."""
        if self.rotation is None:
            return rope(x, self.rope_offset, self.rope_theta)
        return (x.swapaxes(1, 2) @ self.rotation).swapaxes(1, 2)  # one product for all heads


@dataclass(frozen=True)
class Positions:
    """How far the rows of a cache have come, for the layers of one window.

    Every change makes a new value.

    window      keys a token sees, itself included; None for full attention
    slack       tokens that can be undone once the ring has turned
    n_sinks     first tokens of the sequence that are kept besides the window
    rope_theta  base of the rotation; head_dim, the numbers it rotates
    offset      tokens seen; the next token has this position
    written     highest position ever written + 1: beyond the offset lies what a rollback has left
    starts      the rows of a batch share one clock, and `offset` is its time: a row that began at
                time s has its position p at time p + s. One for each row, or one for all
    """

    window: int | None
    slack: int
    n_sinks: int
    rope_theta: float
    head_dim: int
    offset: int = 0
    written: int = 0
    starts: tuple[int, ...] = (0,)

    @property
    def capacity(self) -> int:
        """Slots of the ring."""
        return capacity_of(self.window, self.slack)

    # --- a forward pass ---------------------------------------------------------------------------

    def forward_pass(self, length: int) -> ForwardPass:
        """Describe a pass over the next `length` tokens."""
        # Where all rows began at 0, as a single conversation has, numbers are faster than arrays.
        starts: int | mx.array = 0
        rope_offset: int | mx.array = self.offset
        if any(self.starts):
            starts = mx.array(self.starts)[:, None]
            rope_offset = self.offset - starts[:, 0]
        in_place = length <= self.slack + 1
        first = 0 if self.window is None else max(0, self.offset - self.window + 1)
        return ForwardPass(
            offset=self.offset,
            length=length,
            first=first,
            in_place=in_place,
            make_mask=lambda: self._mask(length, starts, first, in_place),
            rope_offset=rope_offset,
            rope_theta=self.rope_theta,
            head_dim=self.head_dim,
            starts=self.starts,
            new_sinks=self._new_sinks(length, starts),
            sinks=self._sink_view(length, starts),
        )

    def traced_pass(self, offset: mx.array, starts: mx.array, rows: int) -> ForwardPass:
        """Describe a pass over one token at any offset [1], for a function that is traced once.

        All that changes from token to token is an array. Takes starts [B, 1]; the buffers have
        `rows` slots, that of the token included.
        """
        keys = _held(offset, rows, self.capacity)
        position = (offset - starts)[:, 0]
        return ForwardPass(
            offset=0,
            length=1,
            first=0,
            in_place=True,
            make_mask=lambda: window_mask(offset - starts, keys - starts, self.window)[:, None],
            rope_offset=position,
            rope_theta=self.rope_theta,
            head_dim=self.head_dim,
            slot=offset % self.capacity,
        )

    def _mask(self, length: int, starts: int | mx.array, first: int, in_place: bool) -> mx.array | str:
        end = self.offset + length
        together = not any(self.starts)
        if together and (self.window is None or end <= self.window):
            return "causal"
        queries = mx.arange(self.offset, end)
        keys = _held(end - 1, min(end, self.capacity), self.capacity) if in_place else mx.arange(first, end)
        if together:
            return window_mask(queries, keys, self.window)
        return window_mask(queries - starts, keys - starts, self.window)[:, None]

    def _new_sinks(self, length: int, starts: int | mx.array) -> mx.array | None:
        if not self.n_sinks or self.offset - max(self.starts) >= self.n_sinks:
            return None
        source = mx.arange(self.n_sinks)[None] - (self.offset - starts)
        return mx.where((source >= 0) & (source < length), source, -1)

    def _sink_view(self, length: int, starts: int | mx.array) -> SinkView | None:
        if not self.n_sinks or self.window is None or self.offset + length <= self.window:
            return None
        queries = mx.arange(self.offset, self.offset + length)[None] - starts
        behind = queries[:, None, :, None] - mx.arange(self.n_sinks) >= self.window
        nearest = mx.minimum(queries, self.window + self.n_sinks - 1)
        return SinkView(nearest, behind, self.rope_theta)

    def begun(self, length: int) -> Positions:
        """Count `length` tokens as written, before any layer writes: a broken pass must show.

        Raises RollbackError if an earlier one was broken off.
        """
        self.check_intact()
        return replace(self, written=max(self.written, self.offset + length))

    def advanced(self, length: int) -> Positions:
        """Count the `length` tokens of a finished pass as seen."""
        return replace(self, offset=self.offset + length)

    # --- going back and elsewhere -----------------------------------------------------------------

    @property
    def unturned(self) -> bool:
        """Whether no slot has been written for two different positions yet."""
        return self.window is None or self.written <= self.capacity

    @property
    def lost(self) -> int:
        """How many tokens less can be undone, because rollbacks have left theirs in the slots."""
        return 0 if self.unturned else self.written - self.offset

    @property
    def intact(self) -> bool:
        """False only after a pass that broke off (Ctrl-C, no memory) has overwritten live slots."""
        return self.lost <= self.slack

    def check_intact(self) -> None:
        """Raise RollbackError if a pass that broke off has overwritten live slots."""
        if not self.intact:
            raise RollbackError("a forward pass was broken off and overwrote keys still needed; reset the cache")

    @property
    def max_rollback(self) -> int:
        """How many tokens can be undone now, in all rows at once."""
        shortest = self.offset - max(self.starts)
        return shortest if self.unturned else min(shortest, max(0, self.slack - self.lost))

    def rolled_back(self, n: int) -> Positions:
        """Forget the last `n` tokens of all rows; RollbackError if that cannot be exact."""
        shortest = self.offset - max(self.starts)
        if not 0 <= n <= shortest:
            raise RollbackError(f"cannot roll back {n} tokens: there are only {shortest}")
        if n > self.max_rollback:
            raise RollbackError(
                f"cannot roll back {n} tokens: only {self.max_rollback} can still be undone "
                f"(slack {self.slack}); prefill the prompt again"
            )
        return replace(self, offset=self.offset - n)

    def at(self, offset: int, written: int | None = None, starts: Sequence[int] = (0,)) -> Positions:
        """Return positions that stand elsewhere, for rings that were filled from elsewhere."""
        return replace(self, offset=offset, written=offset if written is None else written, starts=tuple(starts))

    def turned_to(self, offset: int) -> Positions:
        """Let the clock go on to `offset` or later, by whole turns: every slot stays right."""
        turns = -(-max(0, offset - self.offset) // self.capacity) * self.capacity
        offset = self.offset + turns
        # What a rollback left in a ring that had not turned was no loss, and is none now.
        return self.at(offset, offset + self.lost, [start + turns for start in self.starts])


def _held(last: int | mx.array, rows: int, capacity: int) -> mx.array:
    """Return the position in each of the first `rows` slots once position `last` has been written.

    Negative where nothing has been written yet.
    """
    return last - (last - mx.arange(rows)) % capacity
