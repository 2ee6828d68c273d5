"""A process of our own for work that a stranger's input could make endless or huge.

A chat template, a schema, a pattern: what each takes cannot be known before it is tried, and what is tried in this
process can be neither stopped nor held to an amount of memory. So it is tried in another one, which the operating
system bounds (`m7mlx/worker_process.py`):

    worker = Worker("m7mlx.some_module", setup)    that module's `handler(setup)` gives a function, bytes → bytes
    worker.start()                                 returns at once; the process gets ready meanwhile
    worker.ask(data, seconds=2)                    the function's answer, or a WorkerError within that time
    worker.close()

The module is imported without what `m7mlx/__init__.py` imports, MLX above all: it should need little, so that the
process is there within milliseconds and its memory is the job's.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Self

from m7mlx.errors import WorkerDiedError, WorkerError, WorkerMemoryError, WorkerTimeError
from m7mlx.worker_process import COPY, DONE, ENDED, MAX_FRAME, OUT_OF_MEMORY, PROCESS, REPLY, REQUEST, STATUS

RLIMITS = True  # the operating system bounds the memory where it can; otherwise it is looked at while a job runs
_LOOK = 0.2  # seconds between looks whether this process is ending …
_LOOK_AT_MEMORY = 0.01  # … and at the memory of a job
_OUT_OF_TIME = {-signal.SIGPROF, -signal.SIGALRM, -signal.SIGXCPU}  # how a process ends that has used up its time
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "TZ")
# glibc: one arena, since each takes 64 MB of the addresses, which are bounded; and what one job has freed is not kept
# from the next.
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
_START = """
import json, sys, types
given = json.loads(sys.argv[1])
sys.path[:] = given["path"]
for name, places in given["packages"].items():
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = places
from m7mlx.worker_process import serve
serve(given["module"], given["memory"])
"""


class Worker:
    """One process that answers one question at a time; from any thread, and threads wait for each other.

    A process that runs out of time or memory, or dies, is killed; the next question starts a new one, unless
    `restart` is false: then what the process knew is lost, and every later question raises.
    """

    def __init__(
        self, module: str, setup: bytes = b"", *, memory: int = 512 << 20, startup: float = 30.0, restart: bool = True
    ) -> None:
        """`memory` in bytes for the setup and all jobs, beside what the module takes; `startup` in seconds until it
        can answer."""
        self._module, self._setup = module, setup
        self._memory, self._startup = memory, startup
        self._restart = restart
        self._closed = self._ready = self._lost = False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | _Copy | None = None
        self._line: socket.socket | None = None
        self._seen: Any = None  # psutil's view of the process, where its memory has to be looked at
        self._taken = self._most = 0  # bytes that the process takes without a job; that a job may take
        _open.add(self)

    @property
    def alive(self) -> bool:
        """Whether there is a process at present."""
        process = self._process
        return process is not None and process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process's number, where there is one."""
        process = self._process
        return process.pid if process else None

    def start(self) -> None:
        """Start the process and let it get ready in the background. What goes wrong, the first question tells."""
        with self._lock, suppress(WorkerError):
            if not self._process:
                self._spawn()
        threading.Thread(target=self._warm, name="worker start", daemon=True).start()

    def ask(self, data: bytes, seconds: float, cpu: float | None = None, memory: int | None = None) -> bytes:
        """The handler's answer to `data`. Raises WorkerError: out of time, out of memory, or died.

        `seconds` are the clock's, `cpu` the processor's (of all threads together; the same if not given): on a busy
        machine a job may be given much of the one for little of the other. Both count from the moment that the
        process is ready and nobody else is asking. `memory` is less than the worker's, for a job that needs less.
        """
        if len(data) > MAX_FRAME:
            raise WorkerMemoryError(f"more than {MAX_FRAME >> 20} MB were given to a process of our own")
        with self._lock:
            self._get_ready()
            return self._exchange(data, seconds, cpu or seconds, min(memory or self._memory, self._memory))

    def copy(self) -> Worker:
        """A worker that knows all that this one does, at once; what it learns is its own, and lost when it ends."""
        ours, its = socket.socketpair()
        try:
            with its:
                (number,) = PROCESS.unpack(self._tell(REQUEST.pack(COPY, 0, 0, 0), its.fileno()))
        except BaseException:
            ours.close()
            raise
        copy = Worker(self._module, memory=self._memory, restart=False)
        copy._line, copy._process, copy._ready = ours, _Copy(number, self), True
        if self._seen:
            copy._begin_to_look()
        return copy

    def _tell(self, request: bytes, file: int | None = None) -> bytes:
        """The reply to a request that is no job; with it an open file of ours may go."""
        with self._lock:
            self._get_ready()
            assert self._line
            try:
                self._line.settimeout(self._startup)
                self._line.sendall(request)
                if file is not None:
                    socket.send_fds(self._line, [b"."], [file])
                return self._reply(time.monotonic() + self._startup)
            except OSError:
                died = self._death()
                self._end()
                raise died from None
            except BaseException:
                self._end()
                raise

    def close(self) -> None:
        """End the process, in the middle of a job too; whoever waits for that, and asks later, gets an error."""
        self._closed = True
        line = self._line
        if line:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)  # whoever waits for an answer, wakes
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
        if self._process and not self.alive:  # it was ended from outside, between two questions
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
            raise WorkerDiedError("a process of our own is closed")
        packages = {"m7mlx", self._module.partition(".")[0]}
        places = {name: _places(name) for name in packages}
        given = {
            "path": [os.path.abspath(place) for place in sys.path],
            "packages": {name: [os.path.abspath(p) for p in found] for name, found in places.items() if found},
            "module": self._module,
            "memory": self._memory if RLIMITS else 0,
        }
        ours, its = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", "-c", _START, json.dumps(given)],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_MALLOC | {k: os.environ[k] for k in _ENVIRONMENT if k in os.environ},
                start_new_session=True,  # Ctrl-C in a terminal is not for it
            )
        except (OSError, ValueError) as error:
            ours.close()
            raise WorkerDiedError(f"a process of our own cannot be started: {error}") from None
        finally:
            its.close()
        self._line = ours

    def _exchange(self, data: bytes, seconds: float, cpu: float, memory: int) -> bytes:
        deadline = time.monotonic() + seconds
        assert self._line
        self._most = memory
        try:
            self._line.settimeout(seconds)
            try:
                self._line.sendall(REQUEST.pack(len(data), cpu, seconds, memory) + data)
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
            raise WorkerDiedError("a process of our own answers nonsense")
        body = bytes(self._read(size, deadline))
        if kind == DONE:
            return body
        if kind == OUT_OF_MEMORY:
            raise WorkerMemoryError(_LARGE)
        raise WorkerDiedError(f"a process of our own failed: {body.decode(errors='replace')}")

    def _read(self, size: int, deadline: float) -> bytearray:
        assert self._line
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkerTimeError(_LATE)
            self._line.settimeout(min(left, _LOOK_AT_MEMORY if self._seen else _LOOK))
            try:
                more = self._line.recv_into(view[got:])
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
        import psutil

        assert self._process
        try:
            self._seen = psutil.Process(self._process.pid)
            self._taken = self._seen.memory_info().rss
        except psutil.Error:
            raise self._death() from None

    def _look(self) -> None:
        """Raise if there is a reason to wait no longer, while a job runs."""
        if self._closed or not threading.main_thread().is_alive():
            raise WorkerDiedError("a process of our own is closed")
        if self._seen:
            import psutil

            with suppress(psutil.Error):  # it has just ended, which the line tells
                if self._seen.memory_info().rss > self._taken + self._most:
                    raise WorkerMemoryError(_LARGE)

    def _death(self) -> WorkerError:
        """Why the process has closed its line."""
        if self._closed:
            return WorkerDiedError("a process of our own is closed")
        assert self._process
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return WorkerDiedError("a process of our own answers no longer")
        if status in _OUT_OF_TIME:
            return WorkerTimeError(_LATE)
        how = signal.Signals(-status).name if -status in set(signal.Signals) else f"status {status}"
        return WorkerDiedError(f"a process of our own has ended ({how})")

    def _end(self) -> None:
        """Kill the process and forget it; nothing of it is left in the system's table either."""
        if self._line:
            self._line.close()
        if self._process:
            self._process.kill()
            self._process.wait()
            self._lost = True
        self._line = self._process = self._seen = None
        self._ready = False

    def _forget(self) -> None:
        """Leave the process to the one that this one is a copy of, and so the answers on its line."""
        self._lock = threading.Lock()
        if self._line:
            self._line.close()
        if self._process:
            self._process.returncode = 0  # not for this one to wait for
        self._line = self._process = self._seen = None
        self._ready = False


def _places(package: str) -> list[str]:
    """Where a package lies; none for a module. In a process of our own it has been stood in for, without a spec."""
    if package in sys.modules:
        return list(getattr(sys.modules[package], "__path__", ()))
    spec = find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec else []


class _Copy:
    """A copied process, as far as `subprocess.Popen` would be used. Only its original can wait for it."""

    def __init__(self, pid: int, original: Worker) -> None:
        self.pid, self.returncode = pid, None
        self._original, self._parent = original, original.pid

    returncode: int | None

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        """Do nothing: its line has been closed, which ends it."""

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = -signal.SIGKILL  # for all we know; without its original, the system itself waits for it
            with suppress(WorkerError):
                if self._original.alive and self._original.pid == self._parent:
                    request = REQUEST.pack(ENDED, 0, 0, 0) + PROCESS.pack(self.pid)
                    (self.returncode,) = STATUS.unpack(self._original._tell(request))
        assert self.returncode is not None
        return self.returncode


_LATE = "a process of our own ran out of time"
_LARGE = "a process of our own ran out of memory"
_open: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for worker in list(_open):
        worker.close()


def _forget_all() -> None:
    for worker in list(_open):
        worker._forget()


os.register_at_fork(after_in_child=_forget_all)
