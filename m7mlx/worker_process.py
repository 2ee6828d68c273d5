"""The process behind a `Worker` of m7mlx/worker.py: limits first, then one job after the other.

The process imports this before anything else, so it needs the standard library alone. Frames go
over a socket, the line, which is the process's standard input:

    request    number of bytes, seconds of the processor, seconds of the clock, bytes of memory;
               bytes
    reply      what became of it, number of bytes; bytes

The first reply, before any request, says whether the operating system bounds the memory; the first
request is the setup. When the line ends, so does the process. Beside it there is a second socket,
the rope, which carries nothing: when it ends, so does the process even during a job. (The line
cannot say so: the signal of a request may arrive late, in the middle of the request's job.)

A process can make copies of itself, with all that it knows, each with a line and a rope of its own
(COPY, with the other ends of both), and can be asked how they have ended (ENDED).
"""

from __future__ import annotations

import fcntl
import importlib
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

REQUEST = struct.Struct("=IddQ")
REPLY = struct.Struct("=cI")
DONE, OUT_OF_MEMORY, FAILED = b"+", b"m", b"!"
MAX_FRAME = 64 << 20  # bytes, either way
COPY, ENDED = 0xFFFFFFFF, 0xFFFFFFFE  # instead of a number of bytes; ENDED takes a process's number
PROCESS, STATUS = struct.Struct("=I"), struct.Struct("=i")
_FILES = 64  # that may be open at once
_LINE = 0
# On Linux SIGIO ends a process by itself. Elsewhere a handler does, as soon as Python runs; work
# that does not come back to Python is ended by the job's clock.
SIGIO_ENDS = sys.platform == "linux"


def serve(module: str, memory: int, rope: int) -> NoReturn:
    """Answer requests with the function that `module.handler(setup)` returns, until the line ends.

    memory  bytes that jobs may take, beside what the module takes; with 0 the other side watches
            that
    rope    the open file whose end ends this process
    """
    try:
        _reset_signals()
        rope = _lowered(rope)
        _hold(rope)
        handler = importlib.import_module(module).handler  # before the limits: imports open files
        _limit_files()
        taken = _limit_memory(memory)
        _send(DONE, b"bounded" if taken is not None else b"")
        answer: Callable[[bytes], bytes] | None = None
        now = memory
        while True:
            size, cpu, clock, most = REQUEST.unpack(_read(REQUEST.size))
            if size in (COPY, ENDED):
                _copy(rope) if size == COPY else _tell_end(PROCESS.unpack(_read(PROCESS.size))[0])
                continue
            if size > MAX_FRAME:
                raise MemoryError
            if taken is not None and now != most:
                _, hard = resource.getrlimit(resource.RLIMIT_AS)
                resource.setrlimit(resource.RLIMIT_AS, (min(taken + most, hard), hard))
                now = most
            data = _read(size)
            _begin_job(cpu, clock)
            if answer is None:
                answer, reply = handler(data), b""
            else:
                reply = answer(data)
            if len(reply) > MAX_FRAME:
                raise MemoryError
            _send(DONE, reply)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
    except MemoryError:
        kind, text = OUT_OF_MEMORY, ""
    except BaseException as error:  # a panic of Rust too, which is no Exception
        kind, text = FAILED, f"{type(error).__name__}: {error}"[:2000]
    with suppress(BaseException):
        _send(kind, text.encode(errors="replace"))
    os._exit(1)


def _reset_signals() -> None:
    """Hear all signals: what the parent ignores or blocks is inherited."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for one in (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_DFL)
    signal.signal(signal.SIGIO, signal.SIG_DFL if SIGIO_ENDS else lambda *_: os._exit(1))


def _lowered(file: int) -> int:
    """Give an open file the lowest free number: it came with one of a process that may have many.

    `_limit_files` allows no number beyond the limit for what is opened, or replaced, later.
    """
    low = os.dup(file)
    os.close(file)
    return low


def _hold(rope: int) -> None:
    """Have the process end when the rope does, whatever it is doing."""
    with suppress(OSError):  # where there is no SIGIO the clock ends jobs
        fcntl.fcntl(rope, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(rope, fcntl.F_SETFL, fcntl.fcntl(rope, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([rope], [], [], 0)[0]:  # it ended before
        os._exit(0)


def _limit_files() -> None:
    for what, value in (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, _FILES):
        _, hard = resource.getrlimit(what)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(what, (value, value))


def _limit_memory(memory: int) -> int | None:
    """Limit the addresses that the process may take to those it has, and `memory` bytes more.

    Returns the bytes it has; None where a trial shows that the system does not enforce the limit.
    """
    if not memory:
        return None
    try:
        with open("/proc/self/statm") as sizes:
            taken = int(sizes.read().split()[0]) * mmap.PAGESIZE
    except OSError:
        taken = 0
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + memory if hard == resource.RLIM_INFINITY else min(taken + memory, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError):  # macOS
        return None
    try:
        mmap.mmap(-1, limit).close()  # takes addresses, no memory
    except (OSError, MemoryError):
        return taken
    return None


def _begin_job(cpu: float, clock: float) -> None:
    """Have the process end when its time is up, whatever the job does."""
    signal.setitimer(signal.ITIMER_PROF, cpu)
    signal.setitimer(signal.ITIMER_REAL, clock)


def _copy(rope: int) -> None:
    """Make a copy of this process, which answers on the line that came with the request."""
    with socket.socket(fileno=os.dup(_LINE)) as line:
        _, given, *_ = socket.recv_fds(line, 1, 2)
    number = os.fork()
    if not number:
        for new, old in zip(given, (_LINE, rope), strict=True):
            os.dup2(new, old)
        _hold(rope)
    for new in given:
        os.close(new)
    if number:
        _send(DONE, PROCESS.pack(number))


def _tell_end(number: int) -> None:
    """Say how a copy has ended; kill it if the end of its line has not ended it."""
    for _ in range(100):
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            break
        time.sleep(0.01)
    else:
        os.kill(number, signal.SIGKILL)
        _, status = os.waitpid(number, 0)
    _send(DONE, STATUS.pack(os.waitstatus_to_exitcode(status)))


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
