"""One layer's keys and values: a buffer of rows written round and round, as they are or quantised.

Rows are written into a new name for the old buffer. MLX does that in place as long as nobody else holds the buffer;
whoever does (a snapshot) costs nothing until the next write, and one copy then.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from m7mlx.errors import InputError

GROWTH = 256  # rows added at a time until the ring has its full size
_UNBOUNDED = 1 << 30  # capacity of full attention: slot = position
_BITS = (4, 8)
_GROUPS = (32, 64, 128)

Rows = tuple[mx.array, ...]  # one array [B, n_kv_heads, rows, head_dim]; quantised three: codes, scales, biases


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored: as computed (`bits` None), or quantised in groups along head_dim.

    Scales and biases take 16 bits: at 4 bits in groups of 64 a number takes 4.5. Quantised keys, and the queries
    that meet them, go through a Hadamard transform first: products stay what they are, and the few large
    channels that keys have are spread over all (QuaRot, arXiv 2404.00456), which halves the error and more.
    """

    bits: int | None = None
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits is not None and (self.bits not in _BITS or self.group_size not in _GROUPS):
            raise InputError(
                f"keys and values can be stored in 4 or 8 bits, in groups of 32, 64 or 128; "
                f"not in {self.bits} bits in groups of {self.group_size}"
            )

    def stored_bits(self, dtype: mx.Dtype) -> float:
        """Bits that a number takes, its share of scales and biases included."""
        return 8 * dtype.size if self.bits is None else self.bits + 32 / self.group_size

    def turn(self, x: mx.array) -> mx.array:  # [..., head_dim], keys or queries, already rotated to their positions
        """Into the basis that keys are stored in: orthonormal, the same for keys and queries."""
        odd = x.shape[-1] // (x.shape[-1] & -x.shape[-1])
        return x if self.bits is None or odd > 7 else mx.hadamard_transform(x)  # MLX's sizes: 1, 3, 5, 7 times 2^k

    def encode(self, x: mx.array) -> Rows:  # [B, n_kv_heads, rows, head_dim]
        """The arrays to store; each row by itself, so that it does not matter how a sequence is cut."""
        if self.bits is None:
            return (x,)
        codes, scales, biases = mx.quantize(x, self.group_size, self.bits)
        if x.dtype == mx.float32:  # as in a 16-bit model; 11 bits are finer than any code here
            scales, biases = scales.astype(mx.float16), biases.astype(mx.float16)
        return codes, scales, biases

    def decode(self, rows: Rows, dtype: mx.Dtype) -> mx.array:
        """The inverse of `encode`, up to rounding."""
        if self.bits is None:
            return rows[0]
        codes, scales, biases = rows
        return mx.dequantize(codes, scales.astype(dtype), biases.astype(dtype), self.group_size, self.bits)


class KeysValues(NamedTuple):
    """What a forward pass attends to."""

    keys: Rows
    values: Rows
    format: KVFormat

    def head(self, i: int) -> KeysValues:
        """Those of one KV head."""
        keys, values = (tuple(array[:, i : i + 1] for array in rows) for rows in (self.keys, self.values))
        return KeysValues(keys, values, self.format)


class Sinks(NamedTuple):
    """The first few keys and values of the sequence, each [B, n_kv_heads, sinks, head_dim]; key i at position i."""

    keys: mx.array
    values: mx.array


@dataclass(frozen=True)
class Step:
    """What all layers share in one forward pass over positions offset … offset + length − 1.

    rope_offset  position of the first token: one for all rows, or [B]
    rotation     rotates a single token to it, where a product is faster (`m7mlx.attention.rotation_of`)
    mask         goes to attention as it is: "causal", or bool [length, keys] or [B, 1, length, keys]
    in_place     write first and attend to the ring itself; else to the past, gathered in order, and the new
    slot         where a compiled step writes its token: [1], a number that changes without a new trace
    new_sinks    [B or 1, sinks]: which of the tokens is to be kept as sink i; −1 for none of them
    sinks        how to attend to the sinks; None as long as they are within the window
    """

    offset: int
    length: int
    rope_offset: int | mx.array
    mask: mx.array | str
    in_place: bool
    slot: mx.array | None = None
    rotation: mx.array | None = None
    new_sinks: mx.array | None = None
    sinks: SinkStep | None = None


@dataclass(frozen=True)
class SinkStep:
    """How queries see the sinks that the window has left behind.

    Key i of the sinks stays rotated as at position i; instead the query is rotated to a position that is never
    further than max_kv_size − 1: rotary scores depend on the difference alone.

    positions  [B or 1, length], of the queries, relative to the sinks
    visible    bool [B or 1, 1, length, sinks]
    """

    positions: mx.array
    visible: mx.array


class LayerRing:
    """Keys (rotated) and values of one layer; the row of position p lies in slot p % capacity.

    buffers  the stored arrays, those of the keys first; rows lie along axis 2
    sinks    kept besides, as computed, where a bounded stream needs them (see `RollingCache`)
    """

    def __init__(self, window: int | None, slack: int, kv_format: KVFormat | None = None) -> None:
        self.window = window
        self.capacity = _UNBOUNDED if window is None else window + slack
        self.format = kv_format or KVFormat()
        self.buffers: Rows = ()
        self.sinks: Sinks | None = None

    @property
    def rows(self) -> int:
        """Rows allocated so far: at most `capacity`."""
        return self.buffers[0].shape[2] if self.buffers else 0

    @property
    def arrays(self) -> list[mx.array]:
        """All that is allocated."""
        return [*self.buffers, *(self.sinks or ())]

    def rows_for(self, positions: int) -> int:
        """Rows to allocate so that the positions 0 … positions − 1 have their slots."""
        rows = -(-positions // GROWTH) * GROWTH
        if self.window is None:
            return rows
        # From one window on the ring has its final size, so that its memory is the same ever after.
        return self.capacity if rows >= self.window else rows

    def filled(self, positions: int) -> int:
        """How many slots the positions 0 … positions − 1 take: the first ones, until the ring has turned."""
        return min(positions, self.capacity)

    def update(self, k: mx.array, v: mx.array, step: Step) -> KeysValues:
        """Store the new keys and values [B, n_kv_heads, length, head_dim]; return all those to attend to."""
        if step.new_sinks is not None:
            self._store_sinks(k, v, step.new_sinks)
        new = self.format.encode(k) + self.format.encode(v)
        if step.slot is not None:
            pairs = zip(self.buffers, new, strict=True)
            self.buffers = tuple(mx.slice_update(buffer, row, step.slot, axes=(2,)) for buffer, row in pairs)
            return self._split(self.buffers, self.format)
        if step.in_place:
            self.write(new, step.offset)
            filled = self.filled(step.offset + step.length)
            return self._split(self._read(slice(filled)), self.format)
        pieces = [self._read(slots) for slots in self._past(step.offset)] + [new]
        rows = tuple(mx.concatenate(list(parts), axis=2) for parts in zip(*pieces, strict=True))
        keep = min(step.length, self.capacity)
        self.write(tuple(part[:, :, -keep:] for part in new), step.offset + step.length - keep)
        # Many queries: unpacking the rows once is cheaper than in every product.
        keys, values, _ = self._split(rows, self.format)
        return KeysValues((self.format.decode(keys, k.dtype),), (self.format.decode(values, v.dtype),), KVFormat())

    def quantize(self, kv_format: KVFormat) -> None:
        """Store in fewer bits what is here, and all that comes."""
        if self.buffers:
            keys, values = self.buffers
            self.buffers = kv_format.encode(kv_format.turn(keys)) + kv_format.encode(values)
        if self.sinks is not None:
            self.sinks = Sinks(kv_format.turn(self.sinks.keys), self.sinks.values)
        self.format = kv_format

    def write(self, new: Rows, start: int, into: int | None = None) -> None:
        """Write rows for at most `capacity` positions from `start` on, of all conversations or of one of them."""
        self.reserve(start + new[0].shape[2], new)
        if into is None and new[0].shape[0] != self.buffers[0].shape[0]:  # it would be broadcast to all rows
            raise InputError(f"{new[0].shape[0]} rows of ids for a cache of {self.buffers[0].shape[0]} rows")
        batch = slice(None) if into is None else slice(into, into + 1)
        for slots, source in self.slots(start, new[0].shape[2]):
            pairs = zip(self.buffers, new, strict=True)
            self.buffers = tuple(_written(buffer, batch, slots, part[:, :, source]) for buffer, part in pairs)

    def pad(self, count: int) -> None:
        """Make room for more conversations in the batch."""
        arrays = [mx.concatenate([a, mx.zeros((count, *a.shape[1:]), a.dtype)], axis=0) for a in self.arrays]
        self.buffers, sinks = tuple(arrays[: len(self.buffers)]), arrays[len(self.buffers) :]
        self.sinks = Sinks(*sinks) if sinks else None

    def keep(self, rows: list[int]) -> None:
        """Of all conversations of the batch keep these."""
        which = mx.array(rows)
        self.buffers = tuple(buffer[which] for buffer in self.buffers)
        self.sinks = None if self.sinks is None else Sinks(*(a[which] for a in self.sinks))

    def reserve(self, positions: int, like: Rows) -> None:
        """Allocate what the positions up to `positions` − 1 need, for rows like these."""
        missing = self.rows_for(positions) - self.rows
        if missing <= 0:
            return
        batch = (self.buffers or like)[0].shape[0]
        more = tuple(mx.zeros((batch, a.shape[1], missing, a.shape[3]), a.dtype) for a in like)
        old = zip(self.buffers, more, strict=True)
        self.buffers = tuple(mx.concatenate(list(pair), axis=2) for pair in old) if self.buffers else more

    @staticmethod
    def _split(rows: Rows, kv_format: KVFormat) -> KeysValues:
        half = len(rows) // 2
        return KeysValues(rows[:half], rows[half:], kv_format)

    def _past(self, offset: int) -> list[slice]:
        """The slots of all that position `offset` may still see, oldest first, in at most two runs."""
        first = 0 if self.window is None else max(0, offset - self.window + 1)
        return [slots for slots, _ in self.slots(first, offset - first)]

    def _read(self, slots: slice) -> Rows:
        return tuple(buffer[:, :, slots] for buffer in self.buffers)

    def slots(self, start: int, count: int) -> list[tuple[slice, slice]]:
        """`count` ≤ capacity positions from `start` on, as runs of slots: (slots, which of the positions)."""
        runs, done = [], 0
        while done < count:
            slot = (start + done) % self.capacity
            run = min(count - done, self.capacity - slot)
            runs.append((slice(slot, slot + run), slice(done, done + run)))
            done += run
        return runs

    def _store_sinks(self, k: mx.array, v: mx.array, source: mx.array) -> None:
        """Keep position i from the new row `source`[:, i], where that is not negative."""
        index = mx.maximum(source, 0)[:, None, :, None]
        fresh = Sinks(*(mx.take_along_axis(x, index, axis=2) for x in (k, v)))
        if self.sinks is not None:
            is_new = (source >= 0)[:, None, :, None]
            fresh = Sinks(*(mx.where(is_new, new, old) for new, old in zip(fresh, self.sinks, strict=True)))
        self.sinks = fresh


def _written(buffer: mx.array, batch: slice, slots: slice, rows: mx.array) -> mx.array:
    new = copy.copy(buffer)  # the same memory, until it is written
    new[batch, :, slots] = rows
    return new
