"""Where tokens stand: their rotation, the keys they see, their slots (paper, section 2).

Position i lies in slot i mod capacity of every layer's ring. A ring of W + slack slots holds all
that a token can see, and the slack is what `rollback` can undo:

    window 4, slack 1 → capacity 5; after positions 0 … 6:

        slot      0  1  2  3  4
        position  5  6  2  3  4      the next token, 7, goes to slot 2 and sees 4 5 6 7

Layers with full attention keep all, in a buffer that grows; a model may have layers of both kinds.
All share how far a conversation has come, `Positions`, and the rotation of its tokens. What a pass
is besides, `ForwardPass`, is shared by the layers with the same window. Nothing here holds keys or
values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import numpy as np

from m7mlx.errors import RollbackError
from m7mlx.rope import Rope
from m7mlx.rotation import Rotation, Tables

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


@dataclass(frozen=True)
class SinkView:
    """How queries see the sinks that the window has left behind.

    Key i of the sinks stays rotated as at position i; instead the query is rotated to a position
    that is never further than max_kv_size − 1: rotary scores depend on the difference alone.

    rotation  of the queries, to their positions relative to the sinks
    visible   bool [B or 1, 1, L, sinks]
    """

    rotation: Rotation
    visible: mx.array

    def rotate(self, queries: mx.array) -> mx.array:  # [B, heads, L, head_dim]
        """Rotate queries for the scores of the sinks."""
        return self.rotation.rotate_by_tables(queries)


@dataclass(frozen=True)
class ForwardPass:
    """What all layers with the same window share in one forward pass over L new tokens.

    offset     position of the first new token; in a batch, the time on the rows' clock
    length     L
    first      oldest position that any of the new tokens sees
    in_place   write first and attend to the ring as it lies; otherwise to the keys from `first` on,
               gathered in order, with the new ones behind them
    starts     when each row began; one for all where they began together
    make_mask  makes `mask`, which not everything needs
    rotation   of the new queries and keys, by each row's own positions; all layers share it
    slot       [1], where a compiled pass writes its token, whatever it was traced with
    new_sinks  [B or 1, sinks]: which new token is to be kept as sink i; −1 for none of them
    sinks      how to attend to the sinks; None while they are within the window
    """

    offset: int
    length: int
    first: int
    in_place: bool
    make_mask: Callable[[], mx.array | str]
    rotation: Rotation
    starts: tuple[int, ...] = (0,)
    slot: mx.array | None = None
    new_sinks: mx.array | None = None
    sinks: SinkView | None = None

    @property
    def rows(self) -> int:
        """Rows of a batch; 1 for a single conversation."""
        return len(self.starts)

    @cached_property
    def mask(self) -> mx.array | str:
        """Which query sees which of the keys: "causal", bool [L, keys] or [B, 1, L, keys]."""
        return self.make_mask()

    def rotate(self, x: mx.array) -> mx.array:  # [B, heads, L, head_dim]
        """Rotate queries or keys to their positions."""
        return self.rotation.rotate(x)


@dataclass(frozen=True)
class Span:
    """What the layers of one kind keep of a conversation.

    window   keys a token sees, itself included; None for full attention
    slack    tokens that can be undone once the ring has turned
    n_sinks  first tokens of the sequence that are kept besides the window
    """

    window: int | None
    slack: int
    n_sinks: int = 0

    @property
    def capacity(self) -> int:
        """Slots of the ring."""
        return capacity_of(self.window, self.slack)


@dataclass(frozen=True)
class Positions:
    """How far the rows of a cache have come, in all layers.

    Every change makes a new value.

    spans    one for each kind of layer; a model whose layers have a window in part has two: first
             that of the layers which see further
    rope     how positions rotate queries and keys
    offset   tokens seen; the next token has this position
    written  highest position ever written + 1: beyond the offset lies what a rollback has left
    starts   the rows of a batch share one clock, and `offset` is its time: a row that began at time
             s has its position p at time p + s. One for each row, or one for all
    """

    spans: tuple[Span, ...]
    rope: Rope
    offset: int = 0
    written: int = 0
    starts: tuple[int, ...] = (0,)

    @property
    def slack(self) -> int:
        """Tokens that can be undone once a ring has turned."""
        return self.spans[0].slack

    @property
    def turns_at(self) -> int | None:
        """Tokens after which the smallest ring begins anew; None where all grow."""
        return min((span.capacity for span in self.spans if span.window is not None), default=None)

    # --- a forward pass ---------------------------------------------------------------------------

    def rotation(self, length: int) -> Rotation:
        """Return the rotation of the next `length` tokens."""
        positions = np.arange(self.offset, self.offset + length)[None]
        if not any(self.starts):  # as in a single conversation: a number is faster than an array
            return Rotation(self.rope, self.offset, positions)
        positions = positions - np.array(self.starts)[:, None]
        return Rotation(self.rope, mx.array(positions[:, 0]), positions)

    def forward_passes(self, length: int) -> tuple[ForwardPass, ...]:
        """Describe a pass over the next `length` tokens, for each kind of layer."""
        rotation = self.rotation(length)
        return tuple(self.forward_pass(length, span, rotation) for span in self.spans)

    def forward_pass(self, length: int, span: Span, rotation: Rotation) -> ForwardPass:
        """Describe a pass over the next `length` tokens, for the layers of one kind."""
        starts: int | mx.array = mx.array(self.starts)[:, None] if any(self.starts) else 0
        in_place = length <= span.slack + 1
        first = 0 if span.window is None else max(0, self.offset - span.window + 1)
        return ForwardPass(
            offset=self.offset,
            length=length,
            first=first,
            in_place=in_place,
            make_mask=lambda: self._mask(span, length, starts, first, in_place),
            rotation=rotation,
            starts=self.starts,
            new_sinks=self._new_sinks(span, length, starts),
            sinks=self._sink_view(span, length, rotation),
        )

    def traced_pass(
        self,
        offset: mx.array,
        starts: mx.array,
        rows: int,
        span: Span,
        tables: Tables | None,
    ) -> ForwardPass:
        """Describe a pass over one token at any offset [1], for a function that is traced once.

        All that changes from token to token is an array. Takes starts [B, 1]; the buffers of this
        kind of layer have `rows` slots, that of the token included.
        """
        keys = _held(offset, rows, span.capacity)
        return ForwardPass(
            offset=0,
            length=1,
            first=0,
            in_place=True,
            make_mask=lambda: window_mask(offset - starts, keys - starts, span.window)[:, None],
            rotation=Rotation(self.rope, (offset - starts)[:, 0], given=tables),
            slot=offset % span.capacity,
        )

    def _mask(
        self,
        span: Span,
        length: int,
        starts: int | mx.array,
        first: int,
        in_place: bool,
    ) -> mx.array | str:
        end, capacity = self.offset + length, span.capacity
        together = not any(self.starts)
        if together and (span.window is None or end <= span.window):
            return "causal"
        queries = mx.arange(self.offset, end)
        keys = _held(end - 1, min(end, capacity), capacity) if in_place else mx.arange(first, end)
        if together:
            return window_mask(queries, keys, span.window)
        return window_mask(queries - starts, keys - starts, span.window)[:, None]

    def _new_sinks(self, span: Span, length: int, starts: int | mx.array) -> mx.array | None:
        if not span.n_sinks or self.offset - max(self.starts) >= span.n_sinks:
            return None
        source = mx.arange(span.n_sinks)[None] - (self.offset - starts)
        return mx.where((source >= 0) & (source < length), source, -1)

    def _sink_view(self, span: Span, length: int, rotation: Rotation) -> SinkView | None:
        if not span.n_sinks or span.window is None or self.offset + length <= span.window:
            return None
        assert rotation.positions is not None
        queries = rotation.positions
        behind = queries[:, None, :, None] - np.arange(span.n_sinks) >= span.window
        nearest = np.minimum(queries, span.window + span.n_sinks - 1)
        return SinkView(Rotation(self.rope, 0, nearest), mx.array(behind))

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
        """Whether no slot of any layer has been written for two different positions yet."""
        return self.turns_at is None or self.written <= self.turns_at

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
        """Let the clock go on to `offset` or later, by whole turns of all rings."""
        turn = math.lcm(*(span.capacity for span in self.spans))
        turns = -(-max(0, offset - self.offset) // turn) * turn
        offset = self.offset + turns
        # What a rollback left in a ring that had not turned was no loss, and is none now.
        return self.at(offset, offset + self.lost, [start + turns for start in self.starts])


def _held(last: int | mx.array, rows: int, capacity: int) -> mx.array:
    """Return the position in each of the first `rows` slots once position `last` has been written.

    Negative where nothing has been written yet.
    """
    return last - (last - mx.arange(rows)) % capacity
