"""A process of our own for work that a stranger's input could make endless or huge.

What a chat template, a schema or a pattern takes cannot be known before it is tried, and work in
this process can neither be stopped nor be held to an amount of memory. So it is done in another
process, which the operating system bounds (`m7mlx/worker_process.py`):

    worker = Worker("m7mlx.some_module", setup)
    worker.start()                 returns at once; the process gets ready meanwhile
    worker.ask(data, seconds=2)    the answer, or a WorkerError within that time
    worker.close()

In the process, `handler(setup)` of that module returns the function, bytes → bytes, that answers.

The module is imported without what `m7mlx/__init__.py` imports, MLX above all. It should need
little: then the process starts within milliseconds, and its memory is there for the work.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

from m7mlx.errors import WorkerDiedError, WorkerError, WorkerMemoryError, WorkerTimeError
from m7mlx.worker_process import COPY, DONE, ENDED, MAX_FRAME, OUT_OF_MEMORY, PROCESS, REPLY, REQUEST, STATUS
from m7mlx.worker_start import Ends, start_process

RLIMITS = True  # let the operating system bound the memory where it can, else watch it
_LOOK = 0.2  # seconds between looks whether this process is ending
_LOOK_AT_MEMORY = 0.01  # seconds between looks at the memory of a job
_OUT_OF_TIME = {-signal.SIGPROF, -signal.SIGALRM, -signal.SIGXCPU}  # how it ends when time is up


class Worker:
    """One process that answers one question at a time. Threads that ask wait for each other.

    A process that runs out of time or memory is killed. The next question starts a new one, unless
    `restart` is false: then what the process knew is lost, and every later question raises.
    """

    def __init__(
        self,
        module: str,
        setup: bytes = b"",
        *,
        memory: int = 512 << 20,
        startup: float = 30.0,
        restart: bool = True,
    ) -> None:
        """Describe the process; the first question, or `start`, starts it.

        memory   bytes for the setup and all jobs, beside what the module itself takes
        startup  seconds that the process may take until it can answer
        """
        self._module, self._setup = module, setup
        self._memory, self._startup = memory, startup
        self._restart = restart
        self._closed = self._ready = self._lost = False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | _Copy | None = None
        self._ends: Ends | None = None
        self._seen: Any = None  # psutil's view of the process, where its memory is watched
        self._taken = 0  # bytes that the process takes without a job
        self._most = 0  # bytes that a job may take
        _open.add(self)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        process = self._process
        return process is not None and process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process's number, if there is a process."""
        process = self._process
        return process.pid if process else None

    def start(self) -> None:
        """Start the process, to get ready in the background; the first question raises errors."""
        with self._lock, suppress(WorkerError):
            if not self._process:
                self._spawn()
        threading.Thread(target=self._warm, name="worker start", daemon=True).start()

    def ask(self, data: bytes, seconds: float, cpu: float | None = None, memory: int | None = None) -> bytes:
        """Return the handler's answer to `data`.

        seconds  that the job may take by the clock
        cpu      that it may take of the processor, all threads together; `seconds` if not given. On
                 a busy machine a job may need much of the first for little of the second
        memory   bytes that the job may take; at most, and if not given, what the worker may

        The time counts from when the process is ready and no other thread is asking. Raises
        WorkerTimeError, WorkerMemoryError or WorkerDiedError.
        """
        if len(data) > MAX_FRAME:
            raise WorkerMemoryError(f"more than {MAX_FRAME >> 20} MB were given to a worker process")
        with self._lock:
            self._get_ready()
            return self._exchange(data, seconds, cpu or seconds, min(memory or self._memory, self._memory))

    def copy(self) -> Worker:
        """Return a worker whose process is a copy of this one's, with all that it knows by now.

        What the copy learns is its own, and is lost when it ends.
        """
        ends = Ends()
        try:
            its = ends.its_line.fileno(), ends.its_rope.fileno()
            (number,) = PROCESS.unpack(self._tell(REQUEST.pack(COPY, 0, 0, 0), its))
        except BaseException:
            ends.close()
            raise
        finally:
            ends.given()
        copy = Worker(self._module, memory=self._memory, restart=False)
        copy._ends, copy._process, copy._ready = ends, _Copy(number, self), True
        if self._seen:
            copy._begin_to_look()
        return copy

    def _tell(self, request: bytes, files: Sequence[int] = ()) -> bytes:
        """Send a request that is no job, perhaps with open files, and return the reply."""
        with self._lock:
            self._get_ready()
            assert self._ends
            try:
                self._ends.line.settimeout(self._startup)
                self._ends.line.sendall(request)
                if files:
                    socket.send_fds(self._ends.line, [b"."], files)
                return self._reply(time.monotonic() + self._startup)
            except OSError:
                died = self._death()
                self._end()
                raise died from None
            except BaseException:
                self._end()
                raise

    def close(self) -> None:
        """End the process, even during a job; whoever waits or asks later gets an error."""
        self._closed = True
        ends = self._ends
        if ends:
            with suppress(OSError):
                ends.line.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for an answer
        with self._lock:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _warm(self) -> None:
        with self._lock, suppress(WorkerError):
            self._get_ready()

    def _get_ready(self) -> None:
        if self._process and not self.alive:  # somebody killed it between two questions
            self._end()
        if not self._process:
            self._spawn()
        if self._ready:
            return
        try:
            is_bounded = bool(self._reply(time.monotonic() + self._startup))
            if not is_bounded:
                self._begin_to_look()
        except BaseException:
            self._end()
            raise
        self._exchange(self._setup, self._startup, self._startup, self._memory)
        self._ready = True

    def _spawn(self) -> None:
        if self._closed or (self._lost and not self._restart):
            raise WorkerDiedError("a worker process is closed")
        self._process, self._ends = start_process(self._module, self._memory if RLIMITS else 0)

    def _exchange(self, data: bytes, seconds: float, cpu: float, memory: int) -> bytes:
        deadline = time.monotonic() + seconds
        assert self._ends
        self._most = memory
        try:
            self._ends.line.settimeout(seconds)
            try:
                self._ends.line.sendall(REQUEST.pack(len(data), cpu, seconds, memory) + data)
            except TimeoutError:
                raise WorkerTimeError(_LATE) from None
            except OSError:
                raise self._death() from None
            return self._reply(deadline)
        except BaseException:
            self._end()
            raise

    def _reply(self, deadline: float) -> bytes:
        kind, size = REPLY.unpack(self._read(REPLY.size, deadline))
        if size > MAX_FRAME:
            raise WorkerDiedError("a worker process answers nonsense")
        body = bytes(self._read(size, deadline))
        if kind == DONE:
            return body
        if kind == OUT_OF_MEMORY:
            raise WorkerMemoryError(_LARGE)
        raise WorkerDiedError(f"a worker process failed: {body.decode(errors='replace')}")

    def _read(self, size: int, deadline: float) -> bytearray:
        assert self._ends
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkerTimeError(_LATE)
            self._ends.line.settimeout(min(left, _LOOK_AT_MEMORY if self._seen else _LOOK))
            try:
                more = self._ends.line.recv_into(view[got:])
            except TimeoutError:
                self._look()
                continue
            except OSError:
                more = 0
            if not more:
                raise self._death()
            got += more
        return data

    def _begin_to_look(self) -> None:
        import psutil  # 60 ms, and Linux does without

        assert self._process
        try:
            self._seen = psutil.Process(self._process.pid)
            self._taken = self._seen.memory_info().rss
        except psutil.Error:
            raise self._death() from None

    def _look(self) -> None:
        """Raise WorkerError where there is no point in waiting for the job any longer."""
        if self._closed or not threading.main_thread().is_alive():
            raise WorkerDiedError("a worker process is closed")
        if self._seen:
            import psutil

            with suppress(psutil.Error):  # it has just ended, and the line will say so
                if self._seen.memory_info().rss > self._taken + self._most:
                    raise WorkerMemoryError(_LARGE)

    def _death(self) -> WorkerError:
        """Find out why the process has closed its line."""
        if self._closed:
            return WorkerDiedError("a worker process is closed")
        assert self._process
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return WorkerDiedError("a worker process answers no longer")
        if status in _OUT_OF_TIME:
            return WorkerTimeError(_LATE)
        how = signal.Signals(-status).name if -status in set(signal.Signals) else f"status {status}"
        return WorkerDiedError(f"a worker process has ended ({how})")

    def _end(self) -> None:
        """Kill the process, wait for its end and forget it."""
        if self._ends:
            self._ends.close()
        if self._process:
            self._process.kill()
            self._process.wait()
            self._lost = True
        self._ends = self._process = self._seen = None
        self._ready = False

    def _forget(self) -> None:
        """After a fork, leave the process and its line to the parent."""
        self._lock = threading.Lock()
        if self._ends:
            self._ends.close()
        if self._process:
            self._process.returncode = 0  # so that nobody waits for it here
        self._ends = self._process = self._seen = None
        self._ready = False


class _Copy:
    """A copied process, like a `subprocess.Popen`; only its original can wait for it."""

    def __init__(self, pid: int, original: Worker) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._original, self._parent = original, original.pid

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        """Do nothing: the process ends when its line is closed, as it has been."""

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = -signal.SIGKILL  # unless its original knows better
            with suppress(WorkerError):
                if self._original.alive and self._original.pid == self._parent:
                    request = REQUEST.pack(ENDED, 0, 0, 0) + PROCESS.pack(self.pid)
                    (self.returncode,) = STATUS.unpack(self._original._tell(request))
        assert self.returncode is not None
        return self.returncode


_LATE = "a worker process ran out of time"
_LARGE = "a worker process ran out of memory"
_open: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for worker in list(_open):
        worker.close()


def _forget_all() -> None:
    for worker in list(_open):
        worker._forget()


os.register_at_fork(after_in_child=_forget_all)
