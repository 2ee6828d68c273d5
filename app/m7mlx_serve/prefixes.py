"""Ended conversations of one model on disk: loaded for a prompt, saved when it is quiet.

Files are read and written on threads of their own, so that nobody's tokens wait for a disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

import mlx.core as mx

from m7mlx import Request
from m7mlx.cache import RollingCache
from m7mlx.cache_folder import CacheFolder, FolderFigures
from m7mlx.model import Mistral
from m7mlx.scheduler import Ended, Scheduler
from m7mlx_serve.errors import report

LEAST = 256  # tokens that are worth a file, or reading one
_SAVES = 2  # conversations that are being written or wait for it: each takes memory of its own


@dataclass(frozen=True)
class PrefixFolder:
    """Where conversations are kept, and how much of them, in bytes."""

    path: Path
    most_bytes: int


class Prefixes:
    """Fetches and saves conversations: what a scheduler keeps, and what it can use."""

    def __init__(self, place: PrefixFolder) -> None:
        self._place = place
        self._folder: CacheFolder | None = None
        self._reading = ThreadPoolExecutor(1, "m7mlx-prefix-read")
        self._writing = ThreadPoolExecutor(1, "m7mlx-prefix-write")
        self._saves: set[Future[None]] = set()
        self._saved: WeakSet[Ended] = WeakSet()  # that are on disk, or need not be

    def open(self, model: Mistral, like: RollingCache) -> None:
        """Begin to use the folder for a model, once all its weights have been read for that.

        A folder that cannot be used is reported, and nothing is kept.
        """
        self._reading.submit(self._open, model, like)

    def _open(self, model: Mistral, like: RollingCache) -> None:
        try:
            self._folder = CacheFolder(self._place.path, model, like, self._place.most_bytes)
        except Exception as error:
            report(error)

    @property
    def figures(self) -> FolderFigures:
        """What the folder holds, and what has been done with it."""
        return FolderFigures() if self._folder is None else self._folder.figures

    async def fetch(self, request: Request, held: Callable[[], Awaitable[int]]) -> Ended | None:
        """Load the conversation of which most can be used for a prompt, where it is worth it.

        held  says how many of the prompt's tokens are in memory
        """
        if len(request.ids) <= LEAST:
            return None
        loop = asyncio.get_running_loop()
        saved, name = await loop.run_in_executor(self._reading, self._find, request)
        folder = self._folder
        if folder is None or saved < LEAST or saved < LEAST + await held():
            return None
        cache = await loop.run_in_executor(self._reading, folder.load, name)
        return None if cache is None else Ended(cache, request.space)

    def _find(self, request: Request) -> tuple[int, str]:
        return (0, "") if self._folder is None else self._folder.find(request.ids, request.space)

    # --- on the engine's thread -------------------------------------------------------------------

    def keep(self, scheduler: Scheduler, ended: Ended) -> None:
        """Keep a conversation that has been loaded."""
        scheduler.keep(ended)
        self._saved.add(ended)

    def has_unsaved(self, scheduler: Scheduler) -> bool:
        """Whether a conversation is kept that is not on disk."""
        return bool(self._unsaved(scheduler))

    def save_next(self, scheduler: Scheduler, is_quiet: bool) -> None:
        """Save a conversation: where it is not quiet, only one that is about to be given up."""
        kept = scheduler.kept
        if is_quiet or len(kept) == scheduler.options["kept"]:
            for ended in [one for one in (kept if is_quiet else kept[:1]) if one not in self._saved][:1]:
                self._save(ended)

    def close(self, scheduler: Scheduler, seconds: float) -> None:
        """Save all that is not on disk, for so long at most, and end the threads.

        What was used last comes first.
        """
        until = time.monotonic() + seconds
        for ended in reversed(self._unsaved(scheduler)):
            while not self._save(ended) and time.monotonic() < until:
                time.sleep(0.01)
        pools = (self._reading, self._writing)
        # Left to the end of their threads, streams abort the process every third time (MLX 0.32).
        for done in (*self._saves, *(pool.submit(mx.clear_streams) for pool in pools)):
            with contextlib.suppress(Exception):
                done.result(max(0.0, until - time.monotonic()))
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        self._folder = None

    def _unsaved(self, scheduler: Scheduler) -> list[Ended]:
        """Conversations that are kept and not on disk; the one to be given up next comes first."""
        return [] if self._folder is None else [kept for kept in scheduler.kept if kept not in self._saved]

    def _save(self, ended: Ended) -> bool:
        """Have a conversation saved; return whether there was room for that."""
        if self._folder is not None and len(ended.ids) >= LEAST:
            self._saves = {save for save in self._saves if not save.done()}
            if len(self._saves) >= _SAVES:
                return False
            mx.eval(ended.cache.arrays)  # what is still to be computed is this thread's
            self._saves.add(self._writing.submit(_write, self._folder, ended))
        self._saved.add(ended)
        return True


def _write(folder: CacheFolder, ended: Ended) -> None:
    try:
        folder.save(ended.cache, ended.space)
    except Exception as error:  # it would have saved some reading, no more
        report(error)
