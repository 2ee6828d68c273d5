"""One layer's keys and values: a buffer of slots written round and round, as computed or quantised.

Rows are written into a new name for the old buffer. MLX does that in place as long as nobody else
holds the buffer; for somebody who does (a snapshot) nothing is copied until the next write, and
then everything once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from m7mlx.arrays import has_kernels
from m7mlx.cpu import native
from m7mlx.errors import InputError
from m7mlx.positions import ForwardPass, capacity_of

GROWTH = 256  # slots added at a time until the ring has its full size
_BITS = (4, 8, 16)
_GROUPS = (32, 64, 128)

Stored = tuple[mx.array, ...]  # one array [B, n_kv_heads, slots, head_dim]; quantised, three: codes, scales, biases


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored: as computed, or quantised in groups along head_dim.

    bits  4 or 8; 16 for float16, whatever they are computed in; None stores them as computed

    Scales and biases take 16 bits: at 4 bits in groups of 64, a number takes 4.5. Quantised keys,
    and the queries that meet them, go through a Hadamard transform first: products stay what they
    are, and the few large channels that keys have are spread over all (QuaRot, arXiv 2404.00456),
    which more than halves the error.
    """

    bits: int | None = None
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits is not None and (self.bits not in _BITS or self.group_size not in _GROUPS):
            raise InputError(
                "keys and values can be stored as computed (32), or in 4, 8 or 16 bits, in groups of 32, 64 or 128; "
                f"not in {self.bits} bits in groups of {self.group_size}"
            )

    def stored_bits(self, dtype: mx.Dtype) -> float:
        """Return the bits that a number takes, its share of scales and biases included."""
        if self.is_packed:
            assert self.bits is not None
            return self.bits + 32 / self.group_size
        return min(8 * dtype.size, self.bits or 32)

    @property
    def is_packed(self) -> bool:
        """Whether numbers share scales in groups."""
        return self.bits in (4, 8)

    def turn(self, x: mx.array) -> mx.array:  # [..., head_dim]
        """Turn rotated keys or queries into the orthonormal basis that keys are stored in."""
        odd = x.shape[-1] // (x.shape[-1] & -x.shape[-1])
        return mx.hadamard_transform(x) if self.is_packed and odd <= 7 else x  # MLX's sizes: 1, 3, 5, 7 times 2^k

    def turn_back(self, x: mx.array) -> mx.array:  # [..., head_dim]
        """Turn keys back into the basis that they were computed in, in float32."""
        x, size = x.astype(mx.float32), x.shape[-1]
        if size & (size - 1) == 0:
            return self.turn(x)  # by Sylvester's matrix, which is its own inverse
        turned = self.turn(mx.eye(size))  # rows; turning multiplies by this orthonormal matrix
        return x @ turned.T

    def encode(self, x: mx.array) -> Stored:  # [B, n_kv_heads, slots, head_dim]
        """Return the arrays to store; each token's are its own, however a sequence is cut."""
        if not self.is_packed:
            return (x.astype(mx.float16) if self.bits == 16 and x.dtype == mx.float32 else x,)
        codes, scales, biases = mx.quantize(x, self.group_size, self.bits)
        if x.dtype == mx.float32:  # as in a 16-bit model; 11 bits are finer than any code here
            scales, biases = scales.astype(mx.float16), biases.astype(mx.float16)
        return codes, scales, biases

    def shaped(self, x: mx.array) -> Stored:  # [B, n_kv_heads, 0, head_dim]
        """Return empty arrays of the types and shapes in which rows like x are stored."""
        if not self.is_packed:
            return self.encode(x)
        assert self.bits is not None
        *shape, dim = x.shape
        groups = mx.zeros((*shape, dim // self.group_size), mx.float16)
        return mx.zeros((*shape, dim * self.bits // 32), mx.uint32), groups, groups

    def decode(self, stored: Stored, dtype: mx.Dtype) -> mx.array:
        """Return what was encoded, up to rounding."""
        if not self.is_packed:
            return stored[0].astype(dtype)
        codes, scales, biases = stored
        return mx.dequantize(codes, scales.astype(dtype), biases.astype(dtype), self.group_size, self.bits)


class KeysValues(NamedTuple):
    """What a forward pass attends to."""

    keys: Stored
    values: Stored
    format: KVFormat

    def head(self, i: int) -> KeysValues:
        """Return those of one KV head."""
        keys, values = (tuple(array[:, i : i + 1] for array in stored) for stored in (self.keys, self.values))
        return KeysValues(keys, values, self.format)


class Sinks(NamedTuple):
    """The first keys and values of the sequence, each [B, n_kv_heads, sinks, head_dim]."""

    keys: mx.array
    values: mx.array


class LayerRing:
    """The keys (rotated) and values of one layer; position p lies in slot p % capacity.

    buffers  the stored arrays, those of the keys first; slots lie along axis 2
    sinks    kept besides, as computed, where a bounded stream needs them (see `RollingCache`)
    kind     which of the cache's `spans` it keeps
    """

    def __init__(self, window: int | None, slack: int, kv_format: KVFormat | None = None, kind: int = 0) -> None:
        self.window = window
        self.slack = slack
        self.kind = kind
        self.capacity = capacity_of(window, slack)
        self.format = kv_format or KVFormat()
        self._buffers: Stored = ()
        self._lent = False  # a snapshot holds the buffers as well
        self._written: mx.array | None = None  # evaluated, the kernels' writes have been done
        self.sinks: Sinks | None = None

    @property
    def buffers(self) -> Stored:
        """The stored arrays, with all that has been written."""
        if self._written is not None:
            mx.eval(self._written)
            self._written = None
        return self._buffers

    @buffers.setter
    def buffers(self, stored: Stored) -> None:
        self._buffers, self._lent, self._written = stored, False, None

    def lend(self) -> Stored:
        """Return the buffers to somebody who keeps them as they are now; the next write copies."""
        stored, self._lent = self.buffers, True
        return stored

    def borrow(self, stored: Stored) -> None:
        """Take buffers that somebody else keeps as they are."""
        self.buffers, self._lent = stored, True

    @property
    def n_slots(self) -> int:
        """Slots allocated so far: at most `capacity`."""
        return self._buffers[0].shape[2] if self._buffers else 0

    @property
    def arrays(self) -> list[mx.array]:
        """All that is allocated."""
        return [*self.buffers, *(self.sinks or ())]

    def slots_for(self, positions: int) -> int:
        """Return how many slots to allocate for the positions 0 … positions − 1."""
        slots = -(-positions // GROWTH) * GROWTH
        if self.window is None:
            return slots
        # From one window on the ring has its final size, so that its memory is the same ever after.
        return self.capacity if slots >= self.window else slots

    def update(self, k: mx.array, v: mx.array, forward: ForwardPass) -> KeysValues:
        """Store new keys and values [B, n_kv_heads, L, head_dim]; return all to attend to."""
        if forward.new_sinks is not None:
            self._store_sinks(k, v, forward.new_sinks)
        new = self.format.encode(k) + self.format.encode(v)
        if forward.slot is not None:
            pairs = zip(self.buffers, new, strict=True)
            self.buffers = tuple(mx.slice_update(buffer, row, forward.slot, axes=(2,)) for buffer, row in pairs)
            return self._split(self.buffers, self.format)
        end = forward.offset + forward.length
        if forward.in_place:
            self.write(new, forward.offset)
            return self._split(self._read(slice(min(end, self.capacity))), self.format)
        past = self.slots(forward.first, forward.offset - forward.first)  # at most two runs, oldest first
        pieces = [self._read(slots) for slots, _ in past] + [new]
        stored = tuple(mx.concatenate(list(parts), axis=2) for parts in zip(*pieces, strict=True))
        keep = min(forward.length, self.capacity)
        self.write(tuple(part[:, :, -keep:] for part in new), end - keep)
        # Many queries: unpacking the rows once is cheaper than in every product.
        keys, values, _ = self._split(stored, self.format)
        return KeysValues((self.format.decode(keys, k.dtype),), (self.format.decode(values, v.dtype),), KVFormat())

    def has_kernel(self, heads: mx.array, forward: ForwardPass) -> bool:
        """Tell whether `attend` can be called: for all but passes that are traced."""
        dim = forward.rotation.rope.head_dim
        turns = not self.format.is_packed or dim & (dim - 1) == 0  # the kernel's Hadamard transform
        return forward.slot is None and turns and dim % 2 == 0 and heads.dtype == mx.float32 and has_kernels()

    def attend(self, heads: mx.array, forward: ForwardPass, n_kv_heads: int) -> mx.array:
        """Store new keys and values and attend to all that the pass lets see, by one kernel.

        Takes heads [B, L, (H + 2 KV) * head_dim]: queries, keys and values, none rotated yet.
        Returns [B, L, H * head_dim]. The kernel writes into the buffers where they lie, so what was
        lent is copied first; `written` keeps the passes in order.
        """
        B, dim = heads.shape[0], forward.rotation.rope.head_dim
        if not self._buffers or self.slots_for(forward.offset + forward.length) > self.n_slots:
            like = mx.zeros((B, n_kv_heads, 0, dim), heads.dtype)
            self.reserve(forward.offset + forward.length, self.format.shaped(like) * 2)
        if self._buffers[0].shape[0] != B:
            raise InputError(f"{B} rows of ids for a cache of {self._buffers[0].shape[0]} rows")
        if self._written is None:  # new, or from elsewhere
            stored = tuple(mx.array(a) if self._lent else mx.contiguous(a) for a in self._buffers)
            mx.eval(stored)
            self.buffers = stored
            self._written = mx.zeros((1,))
        if forward.new_sinks is not None:
            own = heads.reshape(B, forward.length, -1, dim).swapaxes(1, 2)[:, -2 * n_kv_heads :]
            keys, values = mx.split(own, 2, axis=1)
            self._store_sinks(self.format.turn(forward.rotate(keys)), values, forward.new_sinks)
        sinks: Sequence[mx.array] = ()
        if forward.sinks is not None and self.sinks is not None:
            sinks = (forward.sinks.rotation.tables.angles, *self.sinks)
        out: mx.array
        out, self._written = native.kernels().attend(
            heads,
            *forward.rotation.tables,
            self._written,
            self._buffers,
            n_kv_heads,
            forward.offset,
            self.capacity,
            self.window or 0,
            forward.starts if len(forward.starts) == B else forward.starts * B,
            self.format.group_size,
            self.format.is_packed,
            sinks,
        )
        return out

    def emptied(self) -> LayerRing:
        """Return an empty ring of the same kind."""
        return LayerRing(self.window, self.slack, self.format, self.kind)

    def quantize(self, kv_format: KVFormat) -> None:
        """Store in fewer bits what is here already, and all that follows."""
        if self.buffers:
            keys, values = (a.astype(mx.float32) if self.format.bits == 16 else a for a in self.buffers)
            self.buffers = kv_format.encode(kv_format.turn(keys)) + kv_format.encode(values)
        if self.sinks is not None:
            self.sinks = Sinks(kv_format.turn(self.sinks.keys), self.sinks.values)
        self.format = kv_format

    def take(self, other: LayerRing, dtype: mx.Dtype) -> None:
        """Hold what a ring of the same window and slack holds, in this one's format.

        dtype  of keys and values as they are computed
        """
        self.sinks = other.sinks
        is_as_it_is = other.format == self.format or other.format.bits is self.format.bits is None
        if is_as_it_is or not other.buffers:
            self.borrow(other.lend())
            return
        keys, values, _ = self._split(other.buffers, other.format)
        keys, values = self._recode(keys, other.format, dtype, turns=True), self._recode(values, other.format, dtype)
        self.buffers = keys + values
        if other.sinks is not None:
            sinks = self.format.turn(other.format.turn_back(other.sinks.keys))
            self.sinks = Sinks(sinks.astype(other.sinks.keys.dtype), other.sinks.values)

    def _recode(self, stored: Stored, kv_format: KVFormat, dtype: mx.Dtype, *, turns: bool = False) -> Stored:
        x = kv_format.decode(stored, mx.float32)
        if turns:
            x = self.format.turn(kv_format.turn_back(x))
        return self.format.encode(x.astype(dtype))

    def write(self, new: Stored, start: int, into: int | None = None) -> None:
        """Write up to `capacity` positions from `start` on, into all rows of a batch or one."""
        self.reserve(start + new[0].shape[2], new)
        if into is None and new[0].shape[0] != self.buffers[0].shape[0]:  # it would be broadcast to all rows
            raise InputError(f"{new[0].shape[0]} rows of ids for a cache of {self.buffers[0].shape[0]} rows")
        batch = slice(None) if into is None else slice(into, into + 1)
        for slots, source in self.slots(start, new[0].shape[2]):
            pairs = zip(self.buffers, new, strict=True)
            self.buffers = tuple(_written(buffer, batch, slots, part[:, :, source]) for buffer, part in pairs)

    def pad(self, count: int) -> None:
        """Add `count` empty rows to the batch."""
        arrays = [mx.concatenate([a, mx.zeros((count, *a.shape[1:]), a.dtype)], axis=0) for a in self.arrays]
        self.buffers, sinks = tuple(arrays[: len(self.buffers)]), arrays[len(self.buffers) :]
        self.sinks = Sinks(*sinks) if sinks else None

    def keep(self, rows: list[int]) -> None:
        """Keep these rows of the batch, in this order."""
        which = mx.array(rows)
        self.buffers = tuple(buffer[which] for buffer in self.buffers)
        self.sinks = None if self.sinks is None else Sinks(*(a[which] for a in self.sinks))

    def reserve(self, positions: int, like: Stored) -> None:
        """Allocate the slots of the positions 0 … positions − 1, for arrays like these."""
        missing = self.slots_for(positions) - self.n_slots
        if missing <= 0:
            return
        batch = (self.buffers or like)[0].shape[0]
        more = tuple(mx.zeros((batch, a.shape[1], missing, a.shape[3]), a.dtype) for a in like)
        old = zip(self.buffers, more, strict=True)
        self.buffers = tuple(mx.concatenate(list(pair), axis=2) for pair in old) if self.buffers else more

    @staticmethod
    def _split(stored: Stored, kv_format: KVFormat) -> KeysValues:
        half = len(stored) // 2
        return KeysValues(stored[:half], stored[half:], kv_format)

    def _read(self, slots: slice) -> Stored:
        return tuple(buffer[:, :, slots] for buffer in self.buffers)

    def slots(self, start: int, count: int) -> list[tuple[slice, slice]]:
        """Return where `count` ≤ capacity positions lie: runs of (slots, which of them)."""
        runs, done = [], 0
        while done < count:
            slot = (start + done) % self.capacity
            run = min(count - done, self.capacity - slot)
            runs.append((slice(slot, slot + run), slice(done, done + run)))
            done += run
        return runs

    def _store_sinks(self, k: mx.array, v: mx.array, source: mx.array) -> None:
        """Keep as sink i the new token `source`[:, i], where that is not negative."""
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
