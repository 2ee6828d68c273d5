"""The rolling-buffer cache: keys and values of the last W tokens (paper, section 2, figure 2).

Only the last W keys and values can still be attended to, so each layer's ring holds W slots plus a
small slack, and its memory never grows with the conversation. The slack is what `rollback` can
undo, and what lets a few tokens be written first and attended to in place. Which position lies in
which slot is decided in `m7mlx.positions`, which has a drawing.

Layers with full attention keep everything, in a buffer that grows; or, with `max_kv_size`, the last
keys and a few attention sinks (arXiv 2309.17453): the sequence's first keys, which heads attend to
when they need nothing else. A model may have layers of both kinds: its cache can undo what all of
them can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import mlx.core as mx

from m7mlx.config import ModelConfig
from m7mlx.errors import InputError
from m7mlx.positions import Positions, Span
from m7mlx.ring import KVFormat, LayerRing, Sinks, Stored

DEFAULT_SLACK = 8  # 0.2 % of a window of 4,096
DEFAULT_SINKS = 4


class CacheOptions(TypedDict, total=False):
    """The options of a `RollingCache`, for functions that pass them on."""

    slack: int
    kv_bits: int | None
    kv_group_size: int
    max_kv_size: int | None
    sinks: int


@dataclass(frozen=True)
class Snapshot:
    """The state of a RollingCache at one moment; it shares the buffers until either side writes."""

    settings: tuple[object, ...]
    positions: Positions
    ids: list[int]
    layers: list[tuple[Stored, Sinks | None]]

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return self.positions.offset

    @property
    def max_rollback(self) -> int:
        """How many tokens could be undone."""
        return self.positions.max_rollback


class KVCache:
    """The keys and values of all layers, of one conversation or several.

    `RollingCache` and `BatchCache` are the two kinds.

    positions  how far the rows have come
    rings      one for each layer
    format     how keys and values are stored
    owner      the model that these belong to (`Mistral.identity`); None until its first pass
    """

    def __init__(self, config: ModelConfig, positions: Positions, kv_format: KVFormat) -> None:
        self.config = config
        self.positions = positions
        self.format = kv_format
        self.owner: object | None = None
        self.rings = [self._new_ring(window) for window in config.windows]

    def _new_ring(self, window: int | None) -> LayerRing:
        kind = 1 if self.config.layer_types and window is not None else 0
        span = self.positions.spans[kind]
        return LayerRing(span.window, span.slack, self.format, kind)

    def __repr__(self) -> str:
        kept = "all tokens" if self.window is None else f"window {self.window:,} + slack {self.slack}"
        sinks = f" + {self.n_sinks} sinks" if self.n_sinks else ""
        bits = "" if self.format.bits is None else f" in {self.format.bits} bits"
        if len(self.positions.spans) > 1:
            n_sliding = sum(ring.kind for ring in self.rings)
            kept += f", in {n_sliding} layers window {self.positions.spans[1].window:,} + slack {self.slack}"
        layers = f"{len(self.rings)} layers of {self.config.n_kv_heads} × {self.config.head_dim}"
        return f"{type(self).__name__}({self._tokens}, {kept}{sinks}, {layers}{bits}, {self.nbytes / 1e6:.1f} MB)"

    @property
    def _tokens(self) -> str:
        """How many tokens are here, for `repr`."""
        return f"{self.positions.offset:,} tokens"

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers, to be evaluated with the logits.

        A pending write would keep a whole chunk alive.
        """
        return [array for ring in self.rings for array in ring.arrays]

    @property
    def window(self) -> int | None:
        """Keys that a token sees in the layers that see furthest, itself included; None for all."""
        return self.positions.spans[0].window

    @property
    def turns_at(self) -> int | None:
        """Tokens after which no more than the slack can be undone; None where all can, always."""
        return self.positions.turns_at

    @property
    def slack(self) -> int:
        """Tokens that can be undone once the ring has turned."""
        return self.positions.slack

    @property
    def n_sinks(self) -> int:
        """First tokens of the sequence that are kept besides the window."""
        return self.positions.spans[0].n_sinks

    @property
    def max_kv_size(self) -> int | None:
        """Keys that a bounded stream keeps, its sinks included; None for any other cache."""
        if self.window is None or self.config.window is not None:
            return None
        return self.window + self.n_sinks

    @property
    def max_rollback(self) -> int:
        """How many tokens `rollback` can undo now, in every row at once."""
        return self.positions.max_rollback

    @property
    def settings(self) -> tuple[object, ...]:
        """What two caches must share for their rows to be exchanged."""
        return (self.owner, self.config, self.positions.spans, self.format)

    def like(self) -> RollingCache:
        """Return an empty cache of one conversation with the same options."""
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

    def bind(self, owner: object, config: ModelConfig) -> None:
        """Note which model runs the next pass; InputError if another's keys are here."""
        if self.owner is owner:
            return
        shapes = [(c.n_layers, c.n_kv_heads, c.head_dim) for c in (self.config, config)]
        if self.owner is not None or shapes[0] != shapes[1]:
            raise InputError(
                "this cache is another model's, or older than the change of its adapter; make one with new_cache()"
            )
        self.owner = owner

    def begin(self, length: int) -> None:
        """Begin a forward pass over `length` tokens; `advance` ends it.

        `self.positions.forward_passes(length)` describes it.

        Raises RollbackError if an earlier one was broken off.
        """
        self.positions = self.positions.begun(length)

    def advance(self, length: int) -> None:
        """Count the tokens of a finished forward pass as seen."""
        self.positions = self.positions.advanced(length)


class RollingCache(KVCache):
    """The keys and values of one conversation.

    ids     the tokens themselves, kept by whoever knows them (`m7mlx.generate`), so that a later
            prompt can tell how much of it is here already; offset == len(ids) where they are
            complete
    user    who generates with it at present: whoever did so before must not go on
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
        """Make an empty cache.

        slack          tokens that `rollback` can undo
        kv_bits        store keys and values in 4 or 8 bits, in groups of `kv_group_size`; in
                       16, as float16; 32 or None stores them as computed (`Mistral.new_cache`
                       takes the model's default for None)
        max_kv_size    for layers with full attention: keep this many keys, the first `sinks` of the
                       sequence among them, and never end; None keeps all

        Raises InputError for what does not fit together.
        """
        if slack < 0:
            raise InputError(f"slack must not be negative, got {slack}")
        if max_kv_size is not None:
            _check_stream(config, max_kv_size, sinks)
        positions = Positions(_spans(config, slack, max_kv_size, sinks), config.rope)
        kv_format = KVFormat(None if kv_bits == 32 else kv_bits, kv_group_size)
        super().__init__(config, positions, _check_format(config, kv_format))
        self.ids: list[int] = []
        self.user: object | None = None

    @property
    def offset(self) -> int:
        """Tokens seen; the next one has this position."""
        return self.positions.offset

    @property
    def intact(self) -> bool:
        """False only after a forward pass that was broken off had overwritten keys still needed."""
        return self.positions.intact

    def rollback(self, n: int) -> None:
        """Forget the last `n` tokens, exactly.

        Possible for n up to the slack, and for any n while the ring has not turned yet. Otherwise
        keys that would be seen again have been overwritten: RollbackError, and nothing is changed.
        """
        self.positions = self.positions.rolled_back(n)
        del self.ids[self.offset :]

    def snapshot(self) -> Snapshot:
        """Return the state as it is now, to `restore` later.

        Nothing is copied until the next write, and then everything, once. Raises RollbackError
        after a forward pass that was broken off.
        """
        self.positions.check_intact()
        layers = [(ring.lend(), ring.sinks) for ring in self.rings]
        return Snapshot(self.settings, self.positions, list(self.ids), layers)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of a cache with the same settings; InputError for any other."""
        if snapshot.settings != self.settings:
            raise InputError(
                "this snapshot was taken of a cache of another model or another shape, window or precision"
            )
        self.positions, self.ids = snapshot.positions, list(snapshot.ids)
        for ring, (buffers, sinks) in zip(self.rings, snapshot.layers, strict=True):
            ring.borrow(buffers)
            ring.sinks = sinks

    def take(self, other: RollingCache, dtype: mx.Dtype) -> None:
        """Hold what a cache of the same model and window holds, in as many bits as this one stores.

        dtype  of keys and values as they are computed (`Mistral.dtype`)

        Neither sees what the other writes later. Raises InputError for a cache of another model, or
        with another window, slack or sinks; RollbackError after a forward pass that was broken off.
        """
        if other.settings[:3] != self.settings[:3]:
            raise InputError("this cache was made for another model, or with another window, slack or sinks")
        other.positions.check_intact()
        self.reset()  # whatever happens from here on, nothing half taken is used
        for ring, theirs in zip(self.rings, other.rings, strict=True):
            ring.take(theirs, dtype)
            mx.eval(ring.arrays)  # layer by layer: what lies between takes float32
        self.positions, self.ids = other.positions, list(other.ids)

    def quantize(self, kv_bits: int, kv_group_size: int = 64) -> None:
        """Store keys and values in 4, 8 or 16 bits from now on, those already here included.

        Raises InputError if they are quantised otherwise already, or the groups do not divide
        head_dim.
        """
        kv_format = _check_format(self.config, KVFormat(kv_bits, kv_group_size))
        if kv_format == self.format:
            return
        if self.format.is_packed:
            raise InputError(f"keys and values are stored in {self.format.bits} bits already")
        self.format = kv_format
        for ring in self.rings:
            ring.quantize(kv_format)

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        self.positions = self.positions.at(0)
        self.ids = []


def _spans(config: ModelConfig, slack: int, max_kv_size: int | None, sinks: int) -> tuple[Span, ...]:
    """Return what each kind of layer keeps; full attention comes first."""
    full = Span(None, slack) if max_kv_size is None else Span(max_kv_size - sinks, slack, sinks)
    sliding = Span(config.sliding_window, slack)
    if config.layer_types:
        return full, sliding
    return (full if config.sliding_window is None else sliding,)


def _check_stream(config: ModelConfig, max_kv_size: int, sinks: int) -> None:
    if config.window is not None:
        raise InputError(f"this model's own window bounds its cache to {config.window} keys; leave out max_kv_size")
    if sinks < 0 or max_kv_size <= sinks:
        raise InputError(f"max_kv_size must be above the number of sinks, not {max_kv_size} with {sinks} sinks")
    if max_kv_size > config.max_position_embeddings:
        raise InputError(
            f"max_kv_size must not exceed the model's context of {config.max_position_embeddings}, not {max_kv_size}"
        )


def _check_format(config: ModelConfig, kv_format: KVFormat) -> KVFormat:
    if kv_format.is_packed and config.head_dim % kv_format.group_size:
        raise InputError(
            f"groups of {kv_format.group_size} do not divide this model's head_dim of {config.head_dim}; "
            "choose a smaller kv_group_size"
        )
    return kv_format
