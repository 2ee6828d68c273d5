"""The models that are served: loaded when they are asked for, within a bound of memory.

Each has an engine, whose thread owns it, and readers of its own. What has been asked of a model
goes on until it ends: a model leaves only once nobody uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from m7mlx.cache_folder import FolderFigures
from m7mlx.constrain import close_grammars
from m7mlx.errors import M7Error
from m7mlx.memory import AROUND, budget
from m7mlx.parallel.world import World
from m7mlx.units import in_gigabytes
from m7mlx_serve.catalog import About, Catalog, about
from m7mlx_serve.engine import Engine
from m7mlx_serve.errors import ApiError, report
from m7mlx_serve.limits import Limits
from m7mlx_serve.named import meant, unknown_model
from m7mlx_serve.prefixes import PrefixFolder
from m7mlx_serve.readers import Readers

_RETRY = {"Retry-After": "10"}
_LOOK_SECONDS = 1.0  # between looks for models that nobody uses


@dataclass(eq=False)
class Loaded:
    """One model that is loaded, or on its way in or out.

    loading     the work of loading it; None where that was done before the event loop began
    users       requests that use it
    used        when it was used last (time.monotonic)
    is_leaving  whether it leaves once nobody uses it; who asks for it then loads it anew
    """

    name: str
    needed: int
    engine: Engine
    readers: Readers
    loading: asyncio.Task[None] | None = None
    users: int = 0
    used: float = 0.0
    is_leaving: bool = False
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_loaded(self) -> bool:
        """Whether requests can be answered."""
        return self.loading is None or self.loading.done()


@dataclass(frozen=True)
class Keeping:
    """How long models stay loaded.

    pinned   names of those that always stay
    idle     seconds after which one that nobody uses leaves; None for never
    seconds  most time that a request waits for its model
    """

    pinned: Collection[str] = ()
    idle: float | None = None
    seconds: float = 600.0


class Models:
    """Loads and unloads models.

    `start` some before the event loop begins, then `use` them on the loop, and `close`.
    """

    def __init__(
        self,
        catalog: Catalog,
        limits: Limits,
        keeping: Keeping | None = None,
        world: World | None = None,
        failed: Callable[[], None] = lambda: None,
        prefixes: PrefixFolder | None = None,
    ) -> None:
        """Prepare to load what `catalog` lists.

        world     the processes that share the model, which is the only one then
        failed    called on an engine's thread if it ends without being told to; see `failure`
        prefixes  where ended conversations of all models are kept
        """
        self._prefixes = prefixes
        self.catalog, self.limits = catalog, limits
        self._keeping, self._world, self._failed = keeping or Keeping(), world, failed
        self._slots: dict[str, Loaded] = {}
        self._loads = asyncio.Lock()  # one at a time
        self._closing = False
        self.failure: Exception | None = None

    def start(self, names: Sequence[str]) -> None:
        """Load models before the event loop begins. Raises what `m7mlx.load` raises."""
        for name in names:
            slot = self._slot(name)
            slot.readers.start()
            slot.engine.start()
            slot.used = time.monotonic()

    @property
    def loaded(self) -> list[Loaded]:
        """Those that are loaded."""
        return [slot for slot in self._slots.values() if slot.is_loaded]

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return not self._closing and self.failure is None

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return sum(slot.engine.open_requests for slot in self._slots.values())

    @property
    def running(self) -> int:
        """Requests that are read or answered; the other open ones wait."""
        return sum(slot.engine.running for slot in self._slots.values())

    @property
    def prefixes(self) -> list[FolderFigures]:
        """What is on disk of ended conversations, as each engine that is loaded sees it."""
        return [slot.engine.prefixes for slot in self.loaded]

    def about(self, name: str) -> About:
        """What a model is. Raises ApiError for one that is not here, or cannot be served."""
        folder = self.catalog.folder(name)
        if folder is None:
            raise unknown_model(name, self.catalog.names)
        try:
            return about(folder, self.limits)
        except (M7Error, OSError) as error:
            raise ApiError(503, f"the model {name!r} cannot be loaded: {_line(error)}", "model_not_loaded") from None

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Loaded]:
        """Load a model if need be, and keep it as long as it is used. Raises ApiError."""
        try:
            async with asyncio.timeout(self._keeping.seconds):
                slot = await self._taken(meant(name, self.catalog.names))
        except TimeoutError:
            raise ApiError(503, "the model takes long to load; try again later", "model_loading", _RETRY) from None
        try:
            yield slot
        finally:
            slot.users -= 1
            slot.used = time.monotonic()
            if not slot.users:
                slot.unused.set()

    async def unload_idle(self) -> None:
        """Unload models that nobody has used for a while, for ever."""
        while self._keeping.idle is not None:
            await asyncio.sleep(min(_LOOK_SECONDS, self._keeping.idle))
            late = time.monotonic() - self._keeping.idle
            for slot in self._leavable():
                if not slot.users and slot.used < late:
                    await self._unload(slot)

    def cancel(self) -> bool:
        """End all that is under way, which may take a while; return whether it ends in time."""
        self._closing = True
        ended = [slot.engine.close() for slot in list(self._slots.values())]
        close_grammars()
        return all(ended)

    def close(self) -> bool:
        """End all engines and readers; return whether they have ended in time."""
        for slot in list(self._slots.values()):
            slot.readers.close()
        return self.cancel()

    # --- loading ----------------------------------------------------------------------------------

    async def _taken(self, name: str) -> Loaded:
        """The model, loaded, with one user more."""
        while True:
            slot = self._slots.get(name)
            if slot is not None and slot.is_leaving:
                await slot.gone.wait()
                continue
            if slot is None:
                if self._closing:
                    raise ApiError(503, "the server is shutting down", "shutting_down")
                self.about(name)  # whether there is such a model
                slot = self._slot(name)
                slot.loading = asyncio.create_task(self._load(slot))
                slot.loading.add_done_callback(_seen)
            if slot.loading is not None:
                await asyncio.shield(slot.loading)  # it goes on for others if this one leaves
            if not slot.is_leaving:
                slot.users += 1
                slot.unused.clear()
                return slot

    def _slot(self, name: str) -> Loaded:
        folder = self.catalog.folder(name)
        assert folder is not None
        engine = Engine(folder, self.limits, self._world, lambda: self._ended(name), self._prefixes)
        slot = self._slots[name] = Loaded(name, about(folder, self.limits).needed, engine, Readers(folder, name))
        return slot

    async def _load(self, slot: Loaded) -> None:
        try:
            async with self._loads:
                await self._make_room(slot)
                slot.readers.start()
                await asyncio.to_thread(slot.engine.start)
        except BaseException as error:
            slot.is_leaving = True
            await asyncio.to_thread(_close, slot)
            self._slots.pop(slot.name, None)
            slot.gone.set()
            if not isinstance(error, M7Error | OSError):
                raise
            raise ApiError(
                503, f"the model {slot.name!r} cannot be loaded: {_line(error)}", "model_not_loaded"
            ) from None
        slot.used = time.monotonic()

    async def _make_room(self, slot: Loaded) -> None:
        """Unload what was used least recently until a model fits. Raises ApiError if it cannot."""
        while True:
            others = [other for other in self._slots.values() if other is not slot and other.is_loaded]
            if not others or sum(other.needed for other in others) + slot.needed + AROUND <= budget():
                return
            if leaving := [other for other in others if other.is_leaving]:
                await leaving[0].gone.wait()
                continue
            leavable = sorted(self._leavable(), key=lambda one: (one.users > 0, one.used))
            if not leavable:
                room = f"it needs {in_gigabytes(slot.needed, 2)} beside those that are pinned"
                raise ApiError(503, f"the model {slot.name!r} cannot be loaded: {room}", "model_not_loaded")
            await self._unload(leavable[0])

    def _leavable(self) -> list[Loaded]:
        """Those that may be unloaded."""
        loaded = [slot for slot in self._slots.values() if slot.is_loaded and not slot.is_leaving]
        return [slot for slot in loaded if slot.name not in self._keeping.pinned]

    async def _unload(self, slot: Loaded) -> None:
        """Unload a model once nobody uses it."""
        slot.is_leaving = True
        while slot.users:
            await slot.unused.wait()
        await asyncio.to_thread(_close, slot)
        self._slots.pop(slot.name, None)
        slot.gone.set()

    def _ended(self, name: str) -> None:
        """Note, on an engine's thread, that it has ended by itself: the server then ends, too."""
        slot = self._slots.get(name)
        if slot is not None and slot.is_loaded:
            self.failure = slot.engine.failure
            self._failed()


def _close(slot: Loaded) -> None:
    slot.engine.close()
    slot.readers.close()
    gc.collect()  # a tokenizer refers to itself, and takes as much as a small model


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _seen(task: asyncio.Task[None]) -> None:
    """Look at the error of a load for which nobody waits any more."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, ApiError):
        with contextlib.suppress(Exception):
            report(error)
