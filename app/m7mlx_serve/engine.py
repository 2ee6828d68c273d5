"""The thread that owns the model: requests go in, pieces of answers come out on the event loop of whoever asked.

MLX's streams belong to the thread that made them, so one thread loads the model and runs the scheduler. Nothing of it
is shared but numbers and pieces.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import mlx.core as mx

from m7mlx import Piece, Request, load
from m7mlx.cache import UNDO_SLACK
from m7mlx.constrain import close_grammars
from m7mlx.errors import BusyError, InputError, RunError
from m7mlx.memory import cache_bytes
from m7mlx.model import Mistral
from m7mlx.parallel.channel import die
from m7mlx.parallel.world import Leader, World
from m7mlx.request import with_grammar
from m7mlx.ring import KVFormat
from m7mlx.scheduler import Scheduler, Told
from m7mlx_serve.errors import report

_SCHEMAS = 8  # requests whose schemas are prepared, or wait for that; more would take the places of others
_LATE = "the answer took too long; ask for fewer tokens"


class LateError(RunError):
    """An answer took longer than it may."""


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

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        world: World | None = None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """`world`, where the model is divided among processes, of which this is the first.

        failed  called on the engine's thread if it ends without being asked to; `failure` then says why
        """
        self._folder, self._limits, self._world, self._on_failure = folder, limits, world, failed
        self.failure: Exception | None = None
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._answers: dict[int, _Answer] = {}  # by the scheduler's numbers; the engine's thread alone
        self._schemas = 0  # requests that wait for one; event loops alone
        self._open = 0  # requests asked and not ended; event loops alone, under the lock
        self._lock = threading.Lock()
        self._ready: threading.Event = threading.Event()
        self._closing = False
        self._compiling = ThreadPoolExecutor(4, "m7mlx-grammar")  # nobody without a grammar waits for one
        self._thread = threading.Thread(target=self._run, name="m7mlx-engine", daemon=True)

    def start(self) -> None:
        """Load the model. Raises what `m7mlx.load` raises."""
        self._thread.start()
        self._ready.wait()
        if self.failure is not None:
            raise self.failure

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive() and not self._closing

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return self._open

    @property
    def running(self) -> int:
        """Requests that are read or answered; the others wait."""
        scheduler: Scheduler | Leader | None = self.__dict__.get("_scheduler")
        return scheduler.load[0] if scheduler else 0

    async def ask(
        self, requests: Sequence[Request], seconds: float = float("inf")
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """(number of the answer, piece) of several answers as they come; the last of each has a finish reason.

        All follow the same JSON schema, or none.

        Closing the iterator cancels them all. Nothing of them goes on for longer than `seconds`.

        Raises BusyError at once, and LateError; what grammar and scheduler refuse comes as a piece.
        """
        n, places = len(requests), self._limits.rows + self._limits.queue
        if n > places:
            raise InputError(f"n: {n} answers at a time are more than the {places} that this server has places for")
        with self._lock:
            if self._open + n > places:
                raise BusyError("too many requests are waiting; try again later")
            self._open += n
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop, until = asyncio.get_running_loop(), time.monotonic() + seconds
        answers = [_Answer(loop, pieces, index, until) for index in range(n)]
        try:
            async with asyncio.timeout(None if seconds == float("inf") else seconds) as clock:
                try:
                    requests = await self._constrained(requests)
                except BusyError:
                    raise
                except Exception as error:
                    yield 0, Piece(finish_reason="cancelled" if self._closing else "failed", error=error)
                    return
                for answer, request in zip(answers, requests, strict=True):
                    self._put(answer, request)
                going = n
                while going:
                    index, piece = await pieces.get()
                    going -= piece.finish_reason is not None
                    yield index, piece
        except TimeoutError:
            if not clock.expired():
                raise
            raise LateError(_LATE) from None
        finally:
            for answer in answers:
                self._commands.put(lambda answer=answer: self._drop(answer))  # type: ignore[misc]
            with self._lock:
                self._open -= n

    async def _constrained(self, requests: Sequence[Request]) -> Sequence[Request]:
        if requests[0].schema is None:
            return requests

        def constrained() -> list[Request]:
            return [with_grammar(request, self.tokenizer) for request in requests]

        if self._schemas >= _SCHEMAS:
            raise BusyError("too many JSON schemas are being prepared; try again later")
        self._schemas += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compiling, constrained)
        finally:
            self._schemas -= 1

    def close(self, timeout: float = 10.0) -> bool:
        """Cancel what is under way and end the thread; whether it has ended."""
        with self._lock:
            self._closing = True
        self._commands.put(lambda: None)
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout)
        close_grammars()
        return not self._thread.is_alive()

    def _put(self, answer: _Answer, request: Request) -> None:
        """Hand a request to the engine's thread; once that has ended, the request has ended too."""
        with self._lock:
            if not self._closing:
                self._commands.put(lambda: self._add(answer, request))
                return
        answer.tell(Piece(finish_reason="cancelled"))

    # --- on the engine's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            try:
                read = load if self._world is None else self._world.load
                self.model, self.tokenizer = read(self._folder)
                self._scheduler = self._scheduled()
            except Exception as error:
                self.failure = error
                return
            finally:
                self._ready.set()
            self._serve()
        except Exception as error:
            if self._world is not None:
                die(f"a pass failed: {' '.join(str(error).split())}")  # the others wait for its end
            self.failure = error
        finally:
            with self._lock:
                self._closing = True  # if it was not asked to end
            while not self._commands.empty():
                self._do(self._commands.get())
            for answer in self._answers.values():
                answer.tell(Piece(finish_reason="cancelled"))
            self._answers.clear()
            if self.failure is not None:
                self._on_failure()
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
                    self._do(self._commands.get(block=not more))
                    more = more or any(self._scheduler.load)
            except Empty:
                pass
            told, more = self._scheduler.step()
            self._tell(told)
            self._expire()

    def _do(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception as error:  # of one answer, which has ended
            if self._world is not None:
                raise
            report(error)

    def _expire(self) -> None:
        """End what has run out of time, whoever should have done so."""
        now = time.monotonic()
        for answer in [a for a in self._answers.values() if a.until < now]:
            self._do(lambda answer=answer: self._drop(answer))  # type: ignore[misc]
            answer.tell(Piece(finish_reason="failed", error=LateError(_LATE)))

    def _add(self, answer: _Answer, request: Request) -> None:
        try:
            answer.number = self._scheduler.add(request)
        except Exception as error:  # of this request alone
            if request.constraint is not None:
                request.constraint.close()
            answer.tell(Piece(finish_reason="failed", error=error))
        else:
            self._answers[answer.number] = answer

    def _drop(self, answer: _Answer) -> None:
        if self._answers.pop(answer.number, None):
            self._scheduler.cancel(answer.number)

    def _tell(self, told: Told) -> None:
        """Hand over the pieces of a step: each loop is woken once, not once for every answer."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Answer, Piece]]] = {}
        for number, piece in told:
            answer = self._answers.get(number)
            if answer is not None:
                by_loop.setdefault(answer.loop, []).append((answer, piece))
                if piece.finish_reason is not None:
                    del self._answers[number]
        for loop, pairs in by_loop.items():
            _on(loop, pairs)


class _Answer:
    """Where the pieces of one answer go, and when it has to have ended (time.monotonic)."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pieces: asyncio.Queue[tuple[int, Piece]],
        index: int,
        until: float,
    ) -> None:
        self.number = 0  # the scheduler's
        self.loop, self.pieces, self.index, self.until = loop, pieces, index, until

    def tell(self, piece: Piece) -> None:
        _on(self.loop, [(self, piece)])


def _on(loop: asyncio.AbstractEventLoop, pairs: list[tuple[_Answer, Piece]]) -> None:
    def put() -> None:
        for answer, piece in pairs:
            answer.pieces.put_nowait((answer.index, piece))

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # the loop has ended: nobody listens any more
        return


def rows_memory(model: Mistral, limits: Limits) -> int:
    """Bytes that keys and values take at most: every row, and every conversation kept."""
    config = model.config
    positions = (config.sliding_window or config.max_position_embeddings) + UNDO_SLACK
    bits = KVFormat(limits.kv_bits).stored_bits(model.dtype)
    return (limits.rows + limits.kept) * cache_bytes(config, positions, bits)
