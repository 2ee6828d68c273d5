"""Ended conversations of one model on disk: loaded for a prompt, saved when it is quiet.

Files are read and written on threads of their own, so that nobody's tokens wait for a disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
_QUIET_SECONDS = 2.0  # without anything to do, after which conversations are saved, one by one
_LAST_SECONDS = 5.0  # for saving them when the engine ends
_SAVES = 2  # conversations that are being written or wait for it: each takes memory of its own

Put = Callable[[Callable[[], None]], bool]
"""Has something done on the engine's thread; returns whether it will be."""


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
        # The engine's thread alone:
        self._scheduler: Scheduler | None = None
        self._saved: WeakSet[Ended] = WeakSet()  # that are on disk, or need not be

    def open(self, model: Mistral, scheduler: Scheduler) -> None:
        """Begin to use the folder for a model, once all its weights have been read for that.

        A folder that cannot be used is reported, and nothing is kept.
        """
        self._scheduler = scheduler
        mx.eval(model.parameters())  # what is still to be computed is this thread's
        self._reading.submit(self._open, model, scheduler.new_cache)

    def _open(self, model: Mistral, like: RollingCache) -> None:
        try:
            self._folder = CacheFolder(self._place.path, model, like, self._place.most_bytes)
        except Exception as error:
            report(error)

    @property
    def figures(self) -> FolderFigures:
        """What the folder holds, and what has been done with it."""
        return FolderFigures() if self._folder is None else self._folder.figures

    async def bring(self, request: Request, put: Put) -> None:
        """Bring back the conversation of which most can be used for a prompt, where it is worth it.

        put  has something done on the engine's thread
        """
        if len(request.ids) <= LEAST:
            return
        loop = asyncio.get_running_loop()
        saved, name = await loop.run_in_executor(self._reading, self._find, request)
        folder = self._folder
        if folder is None or saved < LEAST or saved < LEAST + await self._held(request, put):
            return
        cache = await loop.run_in_executor(self._reading, folder.load, name)
        if cache is not None:
            put(partial(self._keep, Ended(cache, request.space)))

    async def _held(self, request: Request, put: Put) -> int:
        """How many tokens of the start of a prompt are in memory; all once the engine has ended."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[int] = loop.create_future()

        def tell(held: int) -> None:
            if not found.done():
                found.set_result(held)

        def look() -> None:
            held = len(request.ids) if self._scheduler is None else self._scheduler.held(request)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tell, held)

        return await found if put(look) else len(request.ids)

    def _find(self, request: Request) -> tuple[int, str]:
        return (0, "") if self._folder is None else self._folder.find(request.ids, request.space)

    # --- on the engine's thread -------------------------------------------------------------------

    @property
    def quiet_seconds(self) -> float | None:
        """How long to wait for something to do before a conversation is saved; None for ever."""
        return _QUIET_SECONDS if self._unsaved() else None

    def save_next(self, is_quiet: bool) -> None:
        """Save a conversation: where it is not quiet, only one that is about to be given up."""
        unsaved = self._unsaved()
        if self._scheduler is not None and unsaved:
            kept = self._scheduler.kept
            is_last = unsaved[0] is kept[0] and len(kept) == self._scheduler.options["kept"]
            if is_quiet or is_last:
                self._save(unsaved[0])

    def close(self) -> None:
        """Save all that is not on disk, for some seconds at most, and end the threads.

        What was used last comes first.
        """
        until = time.monotonic() + _LAST_SECONDS
        for ended in reversed(self._unsaved()):
            while not self._save(ended) and time.monotonic() < until:
                time.sleep(0.01)
        pools = (self._reading, self._writing)
        # Left to the end of their threads, streams abort the process every third time (MLX 0.32).
        for done in (*self._saves, *(pool.submit(mx.clear_streams) for pool in pools)):
            with contextlib.suppress(Exception):
                done.result(max(0.0, until - time.monotonic()))
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        self._folder = self._scheduler = None

    def _keep(self, ended: Ended) -> None:
        """Keep a conversation that has been loaded."""
        if self._scheduler is not None:
            self._scheduler.keep(ended)
            self._saved.add(ended)

    def _unsaved(self) -> list[Ended]:
        """Conversations that are kept and not on disk; the one to be given up next comes first."""
        if self._folder is None or self._scheduler is None:
            return []
        return [kept for kept in self._scheduler.kept if kept not in self._saved]

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
