"""Several conversations in one forward pass, each at its own position.

The rows share one clock: at time t every row writes slot t % capacity, whatever its own position is. A row that
began at time s has its position p at time p + s; so a step writes one slice for all rows, and a row that joins is
turned once to fit the clock. Rotation and mask go by each row's own positions: no row sees another, nor what
lay in its slots before it began.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from m7mlx.cache import RollingCache
from m7mlx.errors import InputError, RollbackError
from m7mlx.ring import GROWTH, LayerRing, Rows, Sinks, Step

if TYPE_CHECKING:
    from m7mlx.config import ModelConfig


class BatchCache:
    """Rows of keys and values for `model(ids [B, L], cache)`; made from caches that hold one conversation each.

    ids      the tokens of each row, kept by whoever knows them
    offsets  tokens each row has seen

    Prefill each prompt in a cache of its own, then let it join, which copies the batch once, or put it in the place
    of a row that has ended, which copies nothing else.
    """

    def __init__(self, caches: Sequence[RollingCache]) -> None:
        """Raises InputError for no caches, or caches that differ in model, window, slack or precision."""
        if not caches:
            raise InputError("a batch needs at least one cache")
        self._clock = _arrange(caches)
        self._starts = [self._clock.offset - cache.offset for cache in caches]
        self.ids = [list(cache.ids) for cache in caches]

    def __len__(self) -> int:
        """Rows in the batch."""
        return len(self._starts)

    @property
    def offsets(self) -> list[int]:
        return [self._clock.offset - start for start in self._starts]

    @property
    def clock(self) -> RollingCache:
        """The cache that holds all rows, at the time of the longest."""
        return self._clock

    @property
    def rings(self) -> list[LayerRing]:
        return self._clock.rings

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers, to be evaluated with the logits."""
        return self._clock.arrays

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._clock.nbytes

    def bind(self, owner: object, config: ModelConfig) -> None:
        """Say which model the next pass is of. Raises InputError if what is here is another's."""
        self._clock.bind(owner, config)

    def step(self, length: int) -> Step:
        """Describe a forward pass over the next `length` tokens of every row; `advance` ends it."""
        return self._clock.step(length)

    def advance(self, step: Step) -> None:
        """Count the tokens of a finished forward pass as seen."""
        self._clock.advance(step)

    @property
    def max_rollback(self) -> int:
        """How many tokens `rollback` can undo now, in every row at once."""
        return min(self._clock.max_rollback, *self.offsets)

    def rollback(self, n: int) -> None:
        """Forget the last `n` tokens of every row, exactly; RollbackError, and nothing changed, if one cannot."""
        if n > min(self.offsets):
            raise RollbackError(f"cannot roll back {n} tokens: a row of the batch has only {min(self.offsets)}")
        self._clock.rollback(n)
        for ids, offset in zip(self.ids, self.offsets, strict=True):
            del ids[offset:]

    def join(self, cache: RollingCache) -> int:
        """Add a conversation as the last row; its number. The cache itself is not changed. Copies the batch once."""
        if self._must_be_turned(cache):
            joined = BatchCache([*(self.row(i) for i in range(len(self))), cache])
            mx.eval(joined.arrays)
            self._become(joined)
        else:
            for ring in self.rings:
                ring.pad(1)
            self._starts.append(0)
            self.ids.append([])
            self.put(len(self) - 1, cache)
        return len(self) - 1

    def put(self, row: int, cache: RollingCache) -> None:
        """Let a conversation take the place of a row, and copy nothing else. The cache itself is not changed.

        Raises InputError for a cache that differs in model, window, slack or precision.
        """
        if self._must_be_turned(cache):
            self._become(BatchCache([cache if i == row else self.row(i) for i in range(len(self))]))
            mx.eval(self.arrays)
            return
        clock = self._clock
        ahead = max(0, cache.offset - clock.offset)
        if ahead and clock.window is not None:  # whole turns of the ring later, every slot holds what it held
            turns = -(-ahead // clock.rings[0].capacity) * clock.rings[0].capacity
            self._set(clock.offset + turns, clock.written + turns, [start + turns for start in self._starts])
        start = clock.offset - cache.offset
        lost = 0 if cache.unturned else cache.written - cache.offset
        self._starts[row], self.ids[row] = start, list(cache.ids)
        self._set(clock.offset, max(clock.written, clock.offset + lost), self._starts)
        for source, target in zip(cache.rings, clock.rings, strict=True):
            if source.buffers:
                first = max(0, cache.written - source.capacity)
                target.reserve(clock.written, source.buffers)
                _copy(source, target, 0, first, cache.offset, start, into=row)
            if source.sinks is not None and target.sinks is not None:
                target.sinks = Sinks(*map(partial(_put, row), target.sinks, source.sinks))
        mx.eval(self.arrays)

    def leave(self, row: int) -> RollingCache:
        """Take a row out, to go on by itself; rows behind it move up. Raises InputError for the last one left."""
        if len(self) == 1:
            raise InputError("the last row cannot leave its batch; take `row(0)` and drop the batch")
        left = self.row(row)
        self.keep([i for i in range(len(self)) if i != row % len(self)])
        return left

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        if self.outgrown(rows):  # a long row that has left need not be provided for any more
            self._become(BatchCache([self.row(i) for i in rows]))
        else:
            for ring in self.rings:
                ring.keep(list(rows))
            self.ids = [self.ids[i] for i in rows]
            self._starts = [self._starts[i] for i in rows]
            self._set(self._clock.offset, self._clock.written, self._starts)
        mx.eval(self.arrays)

    def outgrown(self, rows: Sequence[int]) -> bool:
        """Whether `keep(rows)` would spare memory that full attention is about to take: the clock has run ahead.

        Rows that take the place of others begin at its time, and it never goes back by itself.
        """
        clock, longest = self._clock, max(self.offsets[i] for i in rows)
        need = clock.rings[0].rows_for
        return clock.window is None and need(clock.offset + 1) > need(longest + GROWTH // 4)

    def row(self, row: int) -> RollingCache:
        """One row as a cache of its own, a copy."""
        start, clock = self._starts[row], self._clock
        cache = clock.like()
        cache.ids = list(self.ids[row])
        cache.move_to(clock.offset - start, clock.written - start)
        for source, target in zip(clock.rings, cache.rings, strict=True):
            if source.buffers:
                first = max(start, clock.written - source.capacity)
                _copy(source, target, row, first, clock.offset, -start)
            if source.sinks is not None:
                target.sinks = Sinks(*(mx.contiguous(a[row][None]) for a in source.sinks))
        mx.eval(cache.arrays)  # a pending copy would hold the batch's buffers, and the next step copy them all
        return cache

    def _must_be_turned(self, cache: RollingCache) -> bool:
        """Whether all rows have to be laid out anew: they are empty, or too short for one that forgets nothing."""
        clock = self._clock
        if cache.settings != clock.settings:
            raise InputError("the rows of a batch must share model, window, slack and precision")
        longer = clock.window is None and cache.offset > clock.offset
        return (
            longer or not clock.rings[0].buffers or (cache.rings[0].sinks is None) != (clock.rings[0].sinks is None)
        )

    def _set(self, offset: int, written: int, starts: list[int]) -> None:
        self._clock.move_to(offset, written, starts)
        self._starts = starts

    def _become(self, other: BatchCache) -> None:
        self._clock, self._starts, self.ids = other._clock, other._starts, other.ids


def _arrange(caches: Sequence[RollingCache]) -> RollingCache:
    """One cache whose rows are those of `caches`, turned to the clock of the longest."""
    clock = caches[0].like()
    if any(cache.settings != clock.settings for cache in caches):
        raise InputError("the rows of a batch must share model, window, slack and precision")
    offset = max(cache.offset for cache in caches)
    # Rows left behind by a rollback are not copied. What they have overwritten stays lost.
    written = offset + max(0 if cache.unturned else cache.written - cache.offset for cache in caches)
    starts = [offset - cache.offset for cache in caches]
    clock.move_to(offset, written, starts)
    for i, target in enumerate(clock.rings):
        sources = [cache.rings[i] for cache in caches]
        like = next((ring for ring in sources if ring.buffers), None)
        if like is None:
            continue
        turned = []
        for cache, source, start in zip(caches, sources, starts, strict=True):
            one = LayerRing(target.window, clock.slack, target.format)
            one.reserve(written, like.buffers)
            if source.buffers:
                _copy(source, one, 0, max(0, cache.written - source.capacity), cache.offset, start)
            turned.append(one)
        target.buffers = _stack([one.buffers for one in turned])
        if like.sinks is not None:
            nothing = Sinks(*(mx.zeros_like(a) for a in like.sinks))
            target.sinks = Sinks(*_stack([ring.sinks or nothing for ring in sources]))
    return clock


def _copy(
    source: LayerRing, target: LayerRing, row: int, first: int, end: int, shift: int, into: int | None = None
) -> None:
    """Copy the positions first … end − 1 of one row to positions moved by `shift`; into one of several rows."""
    for slots, which in source.slots(first, end - first):
        rows: Rows = tuple(buffer[row : row + 1, :, slots] for buffer in source.buffers)
        target.write(rows, first + which.start + shift, into)


def _put(row: int, rows: mx.array, one: mx.array) -> mx.array:
    return mx.concatenate([rows[:row], one, rows[row + 1 :]], axis=0)


def _stack(rows: Sequence[Rows]) -> Rows:
    return tuple(mx.concatenate(list(arrays), axis=0) for arrays in zip(*rows, strict=True))
