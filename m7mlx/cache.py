"""The rolling-buffer cache (paper, section 2 and figure 2): position i lives in slot i mod capacity.

Only the last W keys and values can still be attended to, so the buffer holds W rows plus a small slack and its
memory never grows with the conversation. The slack is what `rollback` can undo, and what lets a few tokens
be written first and attended to in place.

    window 4, slack 1 → capacity 5; after positions 0 … 6:

        slot      0  1  2  3  4
        position  5  6  2  3  4      the next token, 7, goes to slot 2 and sees 4 5 6 7

A model with full attention keeps everything, in a buffer that grows; or, with `max_kv_size`, the last rows and
a few attention sinks (arXiv 2309.17453): the sequence's first keys, on which heads park what they do not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import mlx.core as mx

from m7mlx.arrays import on_cpu
from m7mlx.attention import rotation_of, window_mask
from m7mlx.errors import InputError, RollbackError
from m7mlx.ring import KVFormat, LayerRing, Rows, Sinks, SinkStep, Step

if TYPE_CHECKING:
    from m7mlx.config import ModelConfig

DEFAULT_SLACK = 8  # 0.2 % of a window of 4,096
DEFAULT_SINKS = 4


class CacheOptions(TypedDict, total=False):
    """The options of `RollingCache`, for those who hand them on."""

    slack: int
    kv_bits: int | None
    kv_group_size: int
    max_kv_size: int | None
    sinks: int


@dataclass(frozen=True)
class Snapshot:
    """The state of a RollingCache at one moment; it shares the buffers until either side writes."""

    settings: tuple[object, ...]
    offset: int
    written: int
    max_rollback: int
    ids: list[int]
    layers: list[tuple[Rows, Sinks | None]]


class RollingCache:
    """The keys and values of all layers, and where in the sequence they stand.

    offset  tokens seen; the next token has this position
    ids     the tokens themselves, kept by whoever knows them (`m7mlx.generate`), so that a later prompt can
            tell how much of it is here already; offset == len(ids) where it is complete
    window  keys a token sees, itself included; None for full attention
    slack   tokens that `rollback` can undo once the ring has turned
    owner   the model whose keys and values these are (`Mistral.identity`); None until its first pass
    user    who generates with it at present; whoever did before, does so no more
    written highest position ever written + 1: beyond the offset, what a rollback has left in the slots
    """

    def __init__(
        self,
        config: ModelConfig,
        slack: int = DEFAULT_SLACK,
        *,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        max_kv_size: int | None = None,
        sinks: int = DEFAULT_SINKS,
    ) -> None:
        """An empty cache.

        slack          tokens that `rollback` can undo
        kv_bits        store keys and values in 4 or 8 bits, in groups of `kv_group_size`; None as computed
        max_kv_size    for full attention: keep this many keys, the first `sinks` of the sequence among them,
                       and go on for ever; None keeps all

        Raises InputError for what does not fit together.
        """
        if slack < 0:
            raise InputError(f"slack must not be negative, got {slack}")
        if max_kv_size is not None:
            _check_stream(config, max_kv_size, sinks)
        self.config = config
        self.max_kv_size = max_kv_size
        self.window = config.sliding_window if max_kv_size is None else max_kv_size - sinks
        self.n_sinks = 0 if max_kv_size is None else sinks
        self.slack = slack
        self.format = _check_format(config, KVFormat(kv_bits, kv_group_size))
        self.offset = 0
        self.owner: object | None = None
        self.user: object | None = None
        self.ids: list[int] = []
        self.rings = [LayerRing(self.window, slack, self.format) for _ in range(config.n_layers)]
        self.written = 0
        # In a batch (`m7mlx.batch`) the rows began at different offsets: [B, 1], and the last of them.
        self._starts: int | mx.array = 0
        self._last_start = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers, to be evaluated with the logits: a pending write would keep a whole chunk alive."""
        return [array for ring in self.rings for array in ring.arrays]

    def bind(self, owner: object, config: ModelConfig) -> None:
        """Say which model the next pass is of. Raises InputError if what is here is another's."""
        if self.owner is owner:
            return
        shapes = [(c.n_layers, c.n_kv_heads, c.head_dim) for c in (self.config, config)]
        if self.owner is not None or shapes[0] != shapes[1]:
            raise InputError(
                "this cache is another model's, or older than the change of its adapter; make one with new_cache()"
            )
        self.owner = owner

    # --- a forward pass ---------------------------------------------------------------------------------

    def step(self, length: int) -> Step:
        """Describe a forward pass over the next `length` tokens; `advance` ends it."""
        self.begin(length)
        in_place = length <= self.slack + 1
        queries = mx.arange(self.offset, self.offset + length) - self._starts
        rope_offset = self._rope_offset
        return Step(
            offset=self.offset,
            length=length,
            rope_offset=rope_offset,
            mask=self._mask(queries, in_place),
            in_place=in_place,
            rotation=self._rotation(rope_offset) if length == 1 else None,
            new_sinks=self._new_sinks(length),
            sinks=self._sink_step(queries),
        )

    def step_at(self, offset: mx.array, starts: mx.array, rows: int) -> Step:
        """`step(1)` for any offset [1]: all that changes from token to token is an array, and so traced only once.

        starts  [B, 1]; rows  of the buffers, which hold the token's slot already
        """
        capacity = self.rings[0].capacity
        keys = offset - (offset - mx.arange(rows)) % capacity  # as in `_mask`
        position = (offset - starts)[:, 0] if starts.size > 1 else offset
        return Step(
            offset=0,
            length=1,
            rope_offset=position,
            mask=window_mask(offset - starts, keys - starts, self.window)[:, None],
            in_place=True,
            slot=offset % capacity,
            rotation=self._rotation(position),
        )

    @property
    def starts(self) -> mx.array:
        """Where each row began on the clock, [B, 1]; 0 but in a batch."""
        return mx.array([[0]]) if isinstance(self._starts, int) else self._starts

    def begin(self, length: int) -> None:
        """Count `length` tokens as written before any layer writes: a pass broken off must not go unnoticed.

        Raises RollbackError where one was broken off before.
        """
        if not self.intact:
            raise RollbackError("a forward pass was broken off and overwrote keys still needed; reset the cache")
        self.written = max(self.written, self.offset + length)

    def advance(self, step: Step) -> None:
        """Count the tokens of a finished forward pass as seen."""
        self.offset = step.offset + step.length

    @property
    def _rope_offset(self) -> int | mx.array:
        return self.offset if isinstance(self._starts, int) else self.offset - self._starts[:, 0]

    def _rotation(self, offset: int | mx.array) -> mx.array | None:
        return rotation_of(offset, self.config.rope_theta, self.config.head_dim) if on_cpu() else None

    def _mask(self, queries: mx.array, in_place: bool) -> mx.array | str:
        """Which query sees which row of what `LayerRing.update` will return; `queries` [(B,) length] positions."""
        ring, end = self.rings[0], self.offset + queries.shape[-1]
        if isinstance(self._starts, int) and (self.window is None or end <= self.window):
            return "causal"
        if in_place:  # the ring as it lies: slot s holds the last position that is s modulo capacity
            slots = mx.arange(ring.filled(end))
            keys = end - 1 - (end - 1 - slots) % ring.capacity  # negative where nothing has been written yet
        else:
            keys = mx.arange(0 if self.window is None else max(0, self.offset - self.window + 1), end)
        mask = window_mask(queries, keys - self._starts, self.window)
        return mask if mask.ndim == 2 else mask[:, None]

    def _new_sinks(self, length: int) -> mx.array | None:
        """Which of the next `length` tokens are sinks: `Step.new_sinks`."""
        if not self.n_sinks or self.offset - self._last_start >= self.n_sinks:
            return None
        source = mx.arange(self.n_sinks)[None] - (self.offset - self._starts)
        return mx.where((source >= 0) & (source < length), source, -1)

    def _sink_step(self, queries: mx.array) -> SinkStep | None:
        if not self.n_sinks or self.window is None or self.offset + queries.shape[-1] <= self.window:
            return None
        queries = queries.reshape(-1, queries.shape[-1])
        behind = queries[:, None, :, None] - mx.arange(self.n_sinks) >= self.window
        return SinkStep(mx.minimum(queries, self.window + self.n_sinks - 1), behind)

    # --- going back -------------------------------------------------------------------------------------

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
        if self.unturned:
            return self.offset
        return max(0, self.slack - (self.written - self.offset))

    @property
    def intact(self) -> bool:
        """False only after a forward pass that was broken off (Ctrl-C, no memory) had overwritten live slots."""
        return self.unturned or self.written - self.offset <= self.slack

    @property
    def unturned(self) -> bool:
        """Whether no slot has been written twice yet for different positions."""
        return self.window is None or self.written <= self.window + self.slack

    def snapshot(self) -> Snapshot:
        """The state as it is now, to `restore` later. Nothing is copied until the next write; then all of it, once.

        Raises RollbackError after a forward pass that was broken off.
        """
        if not self.intact:
            raise RollbackError("a forward pass was broken off and overwrote keys still needed; reset the cache")
        layers = [(ring.buffers, ring.sinks) for ring in self.rings]
        return Snapshot(self.settings, self.offset, self.written, self.max_rollback, list(self.ids), layers)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of a cache of the same shape. Raises InputError for any other."""
        if snapshot.settings != self.settings:
            raise InputError(
                "this snapshot was taken of a cache of another model or another shape, window or precision"
            )
        self.offset, self.written, self.ids = snapshot.offset, snapshot.written, list(snapshot.ids)
        for ring, (buffers, sinks) in zip(self.rings, snapshot.layers, strict=True):
            ring.buffers, ring.sinks = buffers, sinks

    @property
    def settings(self) -> tuple[object, ...]:
        """What two caches must share for their rows to be exchanged."""
        return (self.owner, self.config, self.window, self.n_sinks, self.slack, self.format)

    def quantize(self, kv_bits: int, kv_group_size: int = 64) -> None:
        """Store keys and values in 4 or 8 bits from now on, those already here included.

        Raises InputError if they are quantised otherwise already, or the groups do not divide head_dim.
        """
        kv_format = _check_format(self.config, KVFormat(kv_bits, kv_group_size))
        if kv_format == self.format:
            return
        if self.format.bits is not None:
            raise InputError(f"keys and values are stored in {self.format.bits} bits already")
        self.format = kv_format
        for ring in self.rings:
            ring.quantize(kv_format)

    def like(self) -> RollingCache:
        """An empty cache with the same options."""
        cache = RollingCache(
            self.config,
            self.slack,
            kv_bits=self.format.bits,
            kv_group_size=self.format.group_size,
            max_kv_size=self.max_kv_size,
            sinks=self.n_sinks,
        )
        cache.owner = self.owner
        return cache

    def move_to(self, offset: int, written: int, starts: Sequence[int] = (0,)) -> None:
        """Say what buffers that were filled from elsewhere hold (`m7mlx.batch`, `m7mlx.cache_file`)."""
        self.offset, self.written = offset, written
        self._last_start = max(starts)
        self._starts = mx.array(list(starts))[:, None] if len(starts) > 1 or starts[0] else 0

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        self.offset = self.written = 0
        self.ids = []


def _check_stream(config: ModelConfig, max_kv_size: int, sinks: int) -> None:
    if config.sliding_window is not None:
        raise InputError(
            f"this model's own window bounds its cache to {config.sliding_window} keys; leave out max_kv_size"
        )
    if sinks < 0 or max_kv_size <= sinks:
        raise InputError(f"max_kv_size must be above the number of sinks, not {max_kv_size} with {sinks} sinks")
    if max_kv_size > config.max_position_embeddings:
        raise InputError(
            f"max_kv_size must not exceed the model's context of {config.max_position_embeddings}, not {max_kv_size}"
        )


def _check_format(config: ModelConfig, kv_format: KVFormat) -> KVFormat:
    if kv_format.bits is not None and config.head_dim % kv_format.group_size:
        raise InputError(
            f"groups of {kv_format.group_size} do not divide this model's head_dim of {config.head_dim}; "
            "choose a smaller kv_group_size"
        )
    return kv_format
