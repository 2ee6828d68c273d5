"""What a `Worker` of m7mlx/worker.py runs in its process: limits first, then one job after the other.

Imported by the process before anything else, so it needs nothing but the standard library. Frames go over a socket,
which is the process's standard input:

    request    bytes that follow, seconds of the processor, seconds of the clock; the bytes
    reply      what became of it, bytes that follow; the bytes

The first reply, before any request, says whether the operating system bounds the memory; the first request is the
setup. The end of the line is the end of the process, in the middle of a job too.
"""

from __future__ import annotations

import fcntl
import importlib
import mmap
import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

REQUEST = struct.Struct("=Idd")
REPLY = struct.Struct("=cI")
DONE, OUT_OF_MEMORY, FAILED = b"+", b"m", b"!"
MAX_FRAME = 64 << 20  # bytes, either way
_FILES = 64  # that may be open at once
_LINE = 0
# SIGIO ends a process by itself on Linux. Elsewhere Python's handler does, as soon as Python runs; the job's clock
# ends what does not come back to Python.
SIGIO_ENDS = sys.platform == "linux"


def serve(module: str, memory: int) -> NoReturn:
    """Answer requests with the function that `module.handler(setup)` gives, until the line ends.

    `memory` is the most that the process may take in bytes; 0 leaves that to whoever watches it.
    """
    try:
        _reset_signals()
        handler = importlib.import_module(module).handler  # first: imports may write caches and open files
        _send(DONE, b"bounded" if _limit(memory) else b"")
        answer: Callable[[bytes], bytes] | None = None
        while True:
            data, cpu, clock = _receive()
            _begin_job(cpu, clock)
            if answer is None:
                answer, reply = handler(data), b""
            else:
                reply = answer(data)
            if len(reply) > MAX_FRAME:
                raise MemoryError
            _end_job()
            _send(DONE, reply)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
    except MemoryError:
        kind, text = OUT_OF_MEMORY, ""
    except BaseException as error:  # a panic of Rust too, which is no Exception
        kind, text = FAILED, f"{type(error).__name__}: {error}"[:2000]
    with suppress(BaseException):
        _end_job()
        _send(kind, text.encode(errors="replace"))
    os._exit(1)


def _reset_signals() -> None:
    """What the parent ignores or blocks would be so here too."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for one in (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_DFL)
    signal.signal(signal.SIGIO, signal.SIG_DFL if SIGIO_ENDS else lambda *_: os._exit(1))
    fcntl.fcntl(_LINE, fcntl.F_SETOWN, os.getpid())


def _limit(memory: int) -> bool:
    """Limit what the process may use; whether that holds for its memory, which is tried."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_NOFILE, _FILES)
    if not memory:
        return False
    _lower(resource.RLIMIT_AS, memory)
    try:
        mmap.mmap(-1, memory).close()  # takes addresses only
    except (OSError, MemoryError):
        return True
    return False


def _lower(what: int, value: int) -> None:
    _, most = resource.getrlimit(what)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    with suppress(OSError, ValueError):  # macOS refuses some
        resource.setrlimit(what, (value, value))


def _begin_job(cpu: float, clock: float) -> None:
    """From here on the process ends when its time is up, or the line is, whatever the job does."""
    signal.setitimer(signal.ITIMER_PROF, cpu)
    signal.setitimer(signal.ITIMER_REAL, clock)
    fcntl.fcntl(_LINE, fcntl.F_SETFL, fcntl.fcntl(_LINE, fcntl.F_GETFL) | os.O_ASYNC)
    # Nothing is sent during a job, so what can be read by now is the end.
    if select.select([_LINE], [], [], 0)[0]:
        os._exit(0)


def _end_job() -> None:
    fcntl.fcntl(_LINE, fcntl.F_SETFL, fcntl.fcntl(_LINE, fcntl.F_GETFL) & ~os.O_ASYNC)


def _receive() -> tuple[bytes, float, float]:
    size, cpu, clock = REQUEST.unpack(_read(REQUEST.size))
    if size > MAX_FRAME:
        raise MemoryError
    return _read(size), cpu, clock


def _read(size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(_LINE, min(size - len(data), 1 << 20))
        if not part:
            os._exit(0)
        data += part
    return bytes(data)


def _send(kind: bytes, data: bytes) -> None:
    view = memoryview(REPLY.pack(kind, len(data)) + data)
    while view:
        view = view[os.write(_LINE, view) :]
