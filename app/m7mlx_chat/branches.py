"""Caches of branches that were left, so that going back to one reads nothing again."""

from __future__ import annotations

from m7mlx.cache import RollingCache, Snapshot


class Branches:
    """Snapshots, the last used first; the oldest go when they take more than `budget` bytes.

    A snapshot shares its buffers with the cache until the cache writes; it is counted whole from
    the beginning.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: list[tuple[Snapshot, int]] = []

    @property
    def snapshots(self) -> list[Snapshot]:
        return [snapshot for snapshot, _ in self._kept]

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self._kept)

    def keep(self, cache: RollingCache) -> None:
        """Remember the cache as it is now, if the budget holds it and something is in it."""
        if not cache.ids or len(cache.ids) != cache.offset or not cache.intact or cache.nbytes > self._budget:
            return
        self._kept = [(old, nbytes) for old, nbytes in self._kept if old.ids != cache.ids]
        self._kept.insert(0, (cache.snapshot(), cache.nbytes))
        while self.nbytes > self._budget:
            self._kept.pop()

    def clear(self) -> None:
        self._kept = []
