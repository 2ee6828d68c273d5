"""The thread that owns the model: requests go in, pieces of answers come out on event loops.

MLX's streams belong to the thread that made them, so one thread loads the model and runs the
scheduler. It shares nothing but numbers and pieces.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import mlx.core as mx

from m7mlx import Piece, Request, load
from m7mlx.cache_folder import FolderFigures
from m7mlx.embedding import Pooling
from m7mlx.errors import BusyError, RunError
from m7mlx.model import Mistral
from m7mlx.parallel.channel import die
from m7mlx.parallel.world import Leader, World
from m7mlx.rows import Told
from m7mlx.scheduler import Scheduler
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.embedding_job import EmbeddingJob, EmbeddingJobs
from m7mlx_serve.errors import report
from m7mlx_serve.grammars import Grammars
from m7mlx_serve.limits import Limits, Places
from m7mlx_serve.prefixes import Prefixes, PrefixFolder
from m7mlx_serve.recipient import Recipient, send

_LATE = "the answer took too long; ask for fewer tokens"


class LateError(RunError):
    """An answer took longer than it may."""


class EndedError(RunError):
    """The engine answers nothing any more."""


class Engine:
    """Answers requests on a thread of its own.

    Start it, `ask` from any event loop, and `close` it, which ends what is under way.
    """

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        world: World | None = None,
        failed: Callable[[], None] = lambda: None,
        prefixes: PrefixFolder | None = None,
    ) -> None:
        """Prepare to load the model in `folder`.

        world     the processes that share the model, of which this is the first
        failed    called on the engine's thread if it ends without being told to; see `failure`
        prefixes  where ended conversations are kept; they are not where several processes share the
                  model
        """
        self._prefixes = None if prefixes is None or world is not None else Prefixes(prefixes)
        self._folder, self._limits, self._world, self._failed = folder, limits, world, failed
        self.failure: Exception | None = None
        self._model: Mistral | None = None
        self._tokenizer: Tokenizer | None = None
        self._scheduler: Scheduler | Leader | None = None
        self._context = self._weights = self._width = 0
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._recipients: dict[int, Recipient] = {}  # by number; the engine's thread alone
        self._jobs = EmbeddingJobs()  # the engine's thread alone
        self._grammars, self._places = Grammars(), Places(limits.rows + limits.queue)
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="m7mlx-engine", daemon=True)

    def start(self) -> None:
        """Load the model. Raises what `m7mlx.load` raises."""
        self._thread.start()
        self._ready.wait()
        if self.failure is not None:
            raise self.failure

    @property
    def model(self) -> Mistral:
        """The model, once the engine has started and until its thread ends."""
        assert self._model is not None
        return self._model

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, once the engine has started."""
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def context(self) -> int:
        """The most tokens of a conversation, once the engine has started; kept when it ends."""
        return self._context

    @property
    def width(self) -> int:
        """The numbers of an embedding, once the engine has started; kept when it ends."""
        return self._width

    @property
    def weights(self) -> int:
        """The bytes of the model's weights, once the engine has started; kept when it ends."""
        return self._weights

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive() and not self._closing

    @property
    def prefixes(self) -> FolderFigures:
        """What is on disk of ended conversations."""
        return FolderFigures() if self._prefixes is None else self._prefixes.figures

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return self._places.taken

    @property
    def running(self) -> int:
        """Requests that are read or answered; the other open ones wait."""
        scheduler = self._scheduler
        return 0 if scheduler is None else scheduler.running_and_waiting[0]

    async def ask(
        self,
        requests: Sequence[Request],
        seconds: float = float("inf"),
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (number of the answer, piece) of several answers as they come.

        The last piece of each has a finish reason. All follow one JSON schema, or none. Closing the
        iterator cancels them all. None goes on for longer than `seconds`.

        Raises BusyError at once, and LateError; what grammar and scheduler refuse comes as a piece.
        """
        n = len(requests)
        self._places.take(n)
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop, until = asyncio.get_running_loop(), time.monotonic() + seconds
        recipients = [Recipient(loop, pieces, index, until) for index in range(n)]
        try:
            async with asyncio.timeout(None if seconds == float("inf") else seconds) as clock:
                try:
                    requests = await self._grammars.prepared(requests, self.tokenizer)
                except BusyError:
                    raise
                except Exception as error:
                    yield 0, Piece(finish_reason="cancelled" if self._closing else "failed", error=error)
                    return
                if self._prefixes is not None and n == 1:  # more would wait for each other
                    await self._prefixes.bring(requests[0], self._put)
                for recipient, request in zip(recipients, requests, strict=True):
                    if not self._put(partial(self._add, recipient, request)):
                        send([(recipient, Piece(finish_reason="cancelled"))])
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
            for recipient in recipients:
                self._commands.put(partial(self._drop, recipient))
            self._places.give(n)

    async def embed(
        self,
        prompts: Sequence[Sequence[int]],
        pooling: Pooling,
        normalize: bool,
        seconds: float = float("inf"),
    ) -> list[bytes]:
        """The vectors of prompts, each as float32 numbers; a pass at a time, between tokens.

        Raises BusyError at once, LateError, InputError; EndedError once the engine has ended.
        """
        self._places.take(1)
        job = EmbeddingJob(asyncio.get_running_loop(), prompts, pooling, normalize)
        try:
            if not self._put(partial(self._jobs.add, job)):
                raise EndedError("the server is shutting down")
            async with asyncio.timeout(None if seconds == float("inf") else seconds):
                return await job.vectors
        except TimeoutError:
            raise LateError("the vectors took too long; send fewer texts") from None
        finally:
            job.is_wanted = False
            self._places.give(1)

    def close(self, timeout: float = 10.0) -> bool:
        """Cancel all and end the thread; return whether it ends within `timeout` seconds."""
        with self._lock:
            self._closing = True
        self._commands.put(lambda: None)
        self._grammars.close()
        if self._thread.ident is not None:  # it has been started
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _put(self, command: Callable[[], None]) -> bool:
        """Have something done on the engine's thread; return False once that has ended."""
        with self._lock:
            if not self._closing:
                self._commands.put(command)
            return not self._closing

    # --- on the engine's thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            try:
                self._load()
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
            self._end()

    def _load(self) -> None:
        read = load if self._world is None else self._world.load
        self._model, self._tokenizer = read(self._folder)
        config = self._model.config
        self._context, self._width = config.max_position_embeddings, config.hidden_size
        self._weights = self._model.nbytes
        limits = self._limits
        scheduler = Scheduler(
            self._model,
            self._tokenizer,
            rows=limits.rows,
            kept=limits.kept,
            kv_bits=limits.kv_bits,
            max_kv_size=limits.bound(config),
            drafted=limits.drafted,
        )
        self._scheduler = scheduler if self._world is None else Leader(scheduler, self._world)
        if self._prefixes is not None:
            self._prefixes.open(self._model, scheduler)

    def _serve(self) -> None:
        # No local variable holds the scheduler: `_end` frees its arrays while this thread's streams
        # exist.
        assert self._scheduler is not None
        more, prefixes = False, self._prefixes
        while not self._closing:
            try:
                while not self._closing:
                    self._do(self._commands.get(not more, prefixes.quiet_seconds if prefixes else None))
                    more = more or any(self._scheduler.running_and_waiting) or bool(self._jobs)
            except Empty:
                if not more and prefixes:
                    prefixes.save_next(is_quiet=True)
                    continue
            told, more = self._scheduler.step()
            self._tell(told)
            self._end_late_answers()
            if prefixes:
                prefixes.save_next(is_quiet=False)
            more = self._jobs.advance(self.model) or more

    def _end(self) -> None:
        """Tell everybody that nothing goes on, and free the model."""
        with self._lock:
            self._closing = True  # if the engine was not told to end
        while not self._commands.empty():
            self._do(self._commands.get())
        send((recipient, Piece(finish_reason="cancelled")) for recipient in self._recipients.values())
        self._recipients.clear()
        self._jobs.fail(EndedError("the server is shutting down"))
        if self.failure is not None:
            self._failed()
        if self._world is not None:
            self._world.close()
        if self._prefixes is not None:
            self._prefixes.close()
        self._model = self._scheduler = None
        # Left to the end of the thread, streams abort the process every third time (MLX 0.32).
        mx.clear_streams()

    def _do(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception as error:  # of one answer, which has ended
            if self._world is not None:
                raise
            report(error)

    def _add(self, recipient: Recipient, request: Request) -> None:
        try:
            assert self._scheduler is not None
            recipient.number = self._scheduler.add(request)
        except Exception as error:  # of this request alone
            if request.constraint is not None:
                request.constraint.close()
            send([(recipient, Piece(finish_reason="failed", error=error))])
        else:
            self._recipients[recipient.number] = recipient

    def _drop(self, recipient: Recipient) -> None:
        if self._recipients.pop(recipient.number, None) and self._scheduler is not None:
            self._scheduler.cancel(recipient.number)

    def _end_late_answers(self) -> None:
        """End answers that have run out of time, even if their askers should have done so."""
        now = time.monotonic()
        for recipient in [late for late in self._recipients.values() if late.until < now]:
            self._do(partial(self._drop, recipient))
            send([(recipient, Piece(finish_reason="failed", error=LateError(_LATE)))])

    def _tell(self, told: Told) -> None:
        """Send the pieces of a step to those who wait for them."""
        sent = []
        for number, piece in told:
            recipient = self._recipients.get(number)
            if recipient is not None:
                sent.append((recipient, piece))
                if piece.finish_reason is not None:
                    del self._recipients[number]
        send(sent)
