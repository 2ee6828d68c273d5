"""Several conversations in one forward pass, each at its own position.

The rows share one clock: at time t every row writes slot t % capacity, whatever its own position
is. A row that began at time s has its position p at time p + s; so a pass writes one slice for all
rows, and a row that joins is turned once to fit the clock. Rotation and mask go by each row's own
positions: no row sees another, nor what lay in its slots before it began.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from m7mlx.cache import KVCache, RollingCache
from m7mlx.errors import InputError
from m7mlx.positions import Positions
from m7mlx.ring import GROWTH, LayerRing, Sinks, Stored


class BatchCache(KVCache):
    """The keys and values of several conversations, a row each, for model(ids [B, L], cache).

    ids      the tokens of each row, kept by whoever knows them

    Prefill each prompt in a cache of its own, then let it join, which copies the batch once, or put
    it in the place of a row that has ended, which copies nothing else.
    """

    def __init__(self, caches: Sequence[RollingCache]) -> None:
        """Make a batch of caches that hold one conversation each.

        Raises InputError for none, or if they differ in model, window, slack or precision.
        """
        if not caches:
            raise InputError("a batch needs at least one cache")
        first = caches[0]
        if any(cache.settings != first.settings for cache in caches):
            raise InputError("the rows of a batch must share model, window, slack and precision")
        super().__init__(first.config, _on_one_clock([cache.positions for cache in caches]), first.format)
        self.owner = first.owner
        self.ids = [list(cache.ids) for cache in caches]
        for i, ring in enumerate(self.rings):
            _turn_into(
                ring, [cache.rings[i] for cache in caches], [cache.positions for cache in caches], self.positions
            )

    def __len__(self) -> int:
        """Rows in the batch."""
        return len(self.positions.starts)

    @property
    def _tokens(self) -> str:
        return f"{len(self)} rows of {', '.join(f'{offset:,}' for offset in self.offsets)} tokens"

    @property
    def offsets(self) -> list[int]:
        """Tokens that each row has seen."""
        return [self.positions.offset - start for start in self.positions.starts]

    def rollback(self, n: int) -> None:
        """Forget the last `n` tokens of every row; RollbackError, and no change, if one cannot."""
        self.positions = self.positions.rolled_back(n)
        for ids, offset in zip(self.ids, self.offsets, strict=True):
            del ids[offset:]

    def join(self, cache: RollingCache) -> int:
        """Add a conversation as the last row; return its number.

        Copies the batch once. The cache itself is not changed.
        """
        if self._must_be_turned(cache):
            self._become([*(self.row(i) for i in range(len(self))), cache])
        else:
            for ring in self.rings:
                ring.pad(1)
            here = self.positions
            self.positions = here.at(here.offset, here.written, [*here.starts, 0])
            self.ids.append([])
            self.put(len(self) - 1, cache)
        return len(self) - 1

    def put(self, row: int, cache: RollingCache) -> None:
        """Let a conversation take the place of a row, and copy nothing else.

        The cache itself is not changed. Raises InputError if it differs in model, window, slack or
        precision.
        """
        if self._must_be_turned(cache):
            self._become([cache if i == row else self.row(i) for i in range(len(self))])
            return
        here = self.positions.turned_to(cache.offset)
        starts = list(here.starts)
        starts[row] = start = here.offset - cache.offset
        self.positions = here.at(here.offset, max(here.written, here.offset + cache.positions.lost), starts)
        self.ids[row] = list(cache.ids)
        for source, target in zip(cache.rings, self.rings, strict=True):
            if source.buffers:
                first = max(0, cache.positions.written - source.capacity)
                target.reserve(self.positions.written, source.buffers)
                _copy(source, target, 0, first, cache.offset, start, into=row)
            if source.sinks is not None and target.sinks is not None:
                target.sinks = Sinks(*map(partial(_put, row), target.sinks, source.sinks))
        mx.eval(self.arrays)

    def leave(self, row: int) -> RollingCache:
        """Take a row out, to continue by itself; rows behind it move up.

        Raises InputError for the last one left.
        """
        if len(self) == 1:
            raise InputError("the last row cannot leave its batch; take `row(0)` and drop the batch")
        left = self.row(row)
        self.keep([i for i in range(len(self)) if i != row % len(self)])
        return left

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows alone, in this order."""
        if self.outgrown(rows):  # a long row that has left need not be provided for any more
            self._become([self.row(i) for i in rows])
            return
        for ring in self.rings:
            ring.keep(list(rows))
        self.ids = [self.ids[i] for i in rows]
        here = self.positions
        self.positions = here.at(here.offset, here.written, [here.starts[i] for i in rows])
        mx.eval(self.arrays)

    def outgrown(self, rows: Sequence[int]) -> bool:
        """Tell whether `keep(rows)` would spare memory that full attention is about to take.

        Rows that take the place of others begin at the time of the clock, which never goes back by
        itself.
        """
        full = next((ring for ring in self.rings if ring.window is None), None)
        longest = max(self.offsets[i] for i in rows)
        return full is not None and full.slots_for(self.positions.offset + 1) > full.slots_for(longest + GROWTH // 4)

    def row(self, row: int) -> RollingCache:
        """Return one row as a cache of its own, a copy."""
        here, start, cache = self.positions, self.positions.starts[row], self.like()
        cache.ids = list(self.ids[row])
        cache.positions = here.at(here.offset - start, here.written - start)
        for source, target in zip(self.rings, cache.rings, strict=True):
            if source.buffers:
                first = max(start, here.written - source.capacity)
                _copy(source, target, row, first, here.offset, -start)
            if source.sinks is not None:
                target.sinks = Sinks(*(mx.contiguous(a[row][None]) for a in source.sinks))
        mx.eval(cache.arrays)  # a pending copy would hold the batch's buffers, and the next pass copy them all
        return cache

    def _must_be_turned(self, cache: RollingCache) -> bool:
        """Tell whether all rows have to be laid out anew for one that joins.

        They are empty, or too short for one that forgets nothing, or whose rings turn together at
        no time that is near.
        """
        if cache.settings != self.settings:
            raise InputError("the rows of a batch must share model, window, slack and precision")
        turns_as_one = self.window is not None and len(self.positions.spans) == 1
        longer = not turns_as_one and cache.offset > self.positions.offset
        pairs = list(zip(self.rings, cache.rings, strict=True))
        return longer or not self.rings[0].buffers or any((a.sinks is None) != (b.sinks is None) for a, b in pairs)

    def _become(self, caches: Sequence[RollingCache]) -> None:
        """Hold these conversations instead."""
        other = BatchCache(caches)
        mx.eval(other.arrays)
        self.positions, self.rings, self.ids = other.positions, other.rings, other.ids


def _on_one_clock(rows: Sequence[Positions]) -> Positions:
    """Return the positions of all rows, at the time of the longest."""
    offset = max(row.offset for row in rows)
    # Keys left behind by a rollback are not copied. What they have overwritten stays lost.
    written = offset + max(row.lost for row in rows)
    return rows[0].at(offset, written, [offset - row.offset for row in rows])


def _turn_into(
    target: LayerRing,
    sources: Sequence[LayerRing],
    rows: Sequence[Positions],
    clock: Positions,
) -> None:
    """Fill a layer's ring with those of several conversations, turned to their clock."""
    like = next((ring for ring in sources if ring.buffers), None)
    if like is None:
        return
    turned = []
    for source, row, start in zip(sources, rows, clock.starts, strict=True):
        one = target.emptied()
        one.reserve(clock.written, like.buffers)
        if source.buffers:
            _copy(source, one, 0, max(0, row.written - source.capacity), row.offset, start)
        turned.append(one)
    target.buffers = _stack([one.buffers for one in turned])
    if like.sinks is not None:
        nothing = Sinks(*(mx.zeros_like(a) for a in like.sinks))
        target.sinks = Sinks(*_stack([ring.sinks or nothing for ring in sources]))


def _copy(
    source: LayerRing,
    target: LayerRing,
    row: int,
    first: int,
    end: int,
    shift: int,
    into: int | None = None,
) -> None:
    """Copy the positions first … end − 1 of one row, moved by `shift`, into all rows or one."""
    for slots, which in source.slots(first, end - first):
        stored: Stored = tuple(buffer[row : row + 1, :, slots] for buffer in source.buffers)
        target.write(stored, first + which.start + shift, into)


def _put(row: int, rows: mx.array, one: mx.array) -> mx.array:
    return mx.concatenate([rows[:row], one, rows[row + 1 :]], axis=0)


def _stack(rows: Sequence[Stored]) -> Stored:
    return tuple(mx.concatenate(list(arrays), axis=0) for arrays in zip(*rows, strict=True))
