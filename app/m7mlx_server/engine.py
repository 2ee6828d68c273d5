"""The thread that owns the model: requests go in, their events come out on the event loop of whoever asked.

MLX's streams belong to the thread that made them, so one thread loads the model and runs the scheduler. Nothing of it
is shared but numbers and events.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import mlx.core as mx

from m7mlx import load
from m7mlx.channel import die
from m7mlx.distributed import Leader, World
from m7mlx.errors import RunError
from m7mlx.memory import CHAT_SLACK, cache_bytes
from m7mlx.model import Mistral
from m7mlx.request import Event, Request
from m7mlx.ring import KVFormat
from m7mlx.scheduler import Scheduler
from m7mlx.tokenizer import Tokenizer

Prepare = Callable[[Tokenizer], Request]  # runs on a thread of its own, before the request is queued


class BusyError(RunError):
    """As many requests wait as may wait."""


@dataclass(frozen=True)
class Limits:
    """How much at once.

    rows     answers at a time; queue, how many more requests may wait
    kept     conversations that have ended and are kept for their beginnings
    kv_bits  store keys and values in 4 or 8 bits
    """

    rows: int = 8
    queue: int = 64
    kept: int = 8
    kv_bits: int | None = None


class Engine:
    """Start it, then `ask` from any event loop; `close` ends what is under way."""

    def __init__(self, folder: Path, limits: Limits, world: World | None = None) -> None:
        """`world`, where the model is divided among processes, of which this is the first."""
        self._folder, self._limits, self._world = folder, limits, world
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._answers: dict[int, _Answer] = {}  # by the scheduler's numbers; the engine's thread alone
        self._open = 0  # requests asked and not ended; event loops alone, under the lock
        self._lock = threading.Lock()
        self._ready: threading.Event = threading.Event()
        self._failed: Exception | None = None
        self._closing = False
        self._preparing = ThreadPoolExecutor(8, "m7mlx-prepare")
        self._thread = threading.Thread(target=self._run, name="m7mlx-engine", daemon=True)

    def start(self) -> None:
        """Load the model. Raises what `m7mlx.load` raises."""
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive() and not self._closing

    @property
    def load(self) -> int:
        """Requests that have not ended."""
        return self._open

    @property
    def running(self) -> int:
        """Requests that are read or answered; the others wait."""
        scheduler: Scheduler | Leader | None = self.__dict__.get("_scheduler")
        return scheduler.load[0] if scheduler else 0

    async def ask(self, prepare: Prepare) -> AsyncGenerator[Event, None]:
        """The events of a request, the last of which has a reason. Closing the iterator cancels it.

        Raises BusyError at once; what `prepare` and the scheduler refuse comes as an event.
        """
        with self._lock:
            if self._open >= self._limits.rows + self._limits.queue:
                raise BusyError("too many requests are waiting; try again later")
            self._open += 1
        answer = _Answer(asyncio.get_running_loop())
        try:
            try:
                # Long prompts and large grammars take a while: nobody else waits for them.
                request = await answer.loop.run_in_executor(self._preparing, prepare, self.tokenizer)
            except Exception as error:
                yield Event(0, reason="cancelled" if self._closing else "failed", error=error)
                return
            self._put(lambda: self._add(answer, request), answer)
            while True:
                event = await answer.events.get()
                yield event
                if event.reason is not None:
                    return
        finally:
            self._commands.put(lambda: self._drop(answer))
            with self._lock:
                self._open -= 1

    def close(self, timeout: float = 10.0) -> bool:
        """Cancel what is under way and end the thread; whether it has ended."""
        with self._lock:
            self._closing = True
        self._commands.put(lambda: None)
        self._thread.join(timeout)
        self._preparing.shutdown(wait=False)
        return not self._thread.is_alive()

    def _put(self, command: Callable[[], None], answer: _Answer) -> None:
        """… on the engine's thread; once that has ended, the request has ended too."""
        with self._lock:
            if not self._closing:
                self._commands.put(command)
                return
        answer.tell(Event(0, reason="cancelled"))

    # --- on the engine's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            try:
                read = load if self._world is None else self._world.load
                self.model, self.tokenizer = read(self._folder)
                self._scheduler = self._scheduled()
            except Exception as error:
                self._failed = error
                return
            finally:
                self._ready.set()
            self._serve()
        except Exception as error:
            if self._world is None:
                raise
            die(f"a pass failed: {' '.join(str(error).split())}")  # the others wait for its end
        finally:
            with self._lock:
                self._closing = True  # if it was not asked to end
            while not self._commands.empty():
                self._commands.get()()
            for answer in self._answers.values():
                answer.tell(Event(0, reason="cancelled"))
            self._answers.clear()
            if self._world is not None:
                self._world.close()
            self.__dict__.pop("model", None)
            self.__dict__.pop("_scheduler", None)
            mx.clear_streams()  # left to the thread's own end they abort the process every third time (mlx 0.32)

    def _scheduled(self) -> Scheduler | Leader:
        limits = self._limits
        scheduler = Scheduler(self.model, self.tokenizer, rows=limits.rows, kept=limits.kept, kv_bits=limits.kv_bits)
        return scheduler if self._world is None else Leader(scheduler, self._world)

    def _serve(self) -> None:
        more = False
        while not self._closing:
            try:
                while not self._closing:
                    self._commands.get(block=not more)()
                    more = more or any(self._scheduler.load)
            except Empty:
                pass
            events, more = self._scheduler.step()
            self._tell(events)

    def _add(self, answer: _Answer, request: Request) -> None:
        try:
            answer.number = self._scheduler.add(request)
        except Exception as error:  # of this request alone
            answer.tell(Event(0, reason="failed", error=error))
        else:
            self._answers[answer.number] = answer

    def _drop(self, answer: _Answer) -> None:
        if self._answers.pop(answer.number, None):
            self._scheduler.cancel(answer.number)

    def _tell(self, events: list[Event]) -> None:
        """Hand over the events of a step: each loop is woken once, not once for every answer."""
        told: dict[asyncio.AbstractEventLoop, list[tuple[_Answer, Event]]] = {}
        for event in events:
            answer = self._answers.get(event.request)
            if answer is not None:
                told.setdefault(answer.loop, []).append((answer, event))
                if event.reason is not None:
                    del self._answers[event.request]
        for loop, pairs in told.items():
            _on(loop, pairs)


class _Answer:
    """Where the events of one request go."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.number = 0
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.loop = loop

    def tell(self, event: Event) -> None:
        _on(self.loop, [(self, event)])


def _on(loop: asyncio.AbstractEventLoop, pairs: list[tuple[_Answer, Event]]) -> None:
    def put() -> None:
        for answer, event in pairs:
            answer.events.put_nowait(event)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # the loop has ended: nobody listens any more
        return


def rows_memory(model: Mistral, limits: Limits) -> int:
    """Bytes that keys and values take at most: every row, and every conversation kept."""
    config = model.config
    positions = (config.sliding_window or config.max_position_embeddings) + CHAT_SLACK
    bits = KVFormat(limits.kv_bits).stored_bits(model.dtype)
    return (limits.rows + limits.kept) * cache_bytes(config, positions, bits)
