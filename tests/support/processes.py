"""Programs that tests start, which are gone when a test ends.

They have the signals of a program in the foreground.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, AnyStr


def take_signals() -> None:
    """Undo what a shell does to the jobs that a script starts in the background.

    They ignore Ctrl-C, and so would all that a test starts, for ever.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def running(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a program; neither it nor what it starts itself outlives the block.

    A test that fails or runs into its time limit waits for nobody.
    """
    process = subprocess.Popen([str(word) for word in command], start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left (macOS: a zombie alone)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not written yet
                    stream.close()


def piped(stream: IO[AnyStr] | None) -> IO[AnyStr]:
    """A stream of a process that was started with a pipe there."""
    assert stream is not None
    return stream
