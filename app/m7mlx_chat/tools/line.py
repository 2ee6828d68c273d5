"""What becomes of the connection to a server, for both of its ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress


class Line:
    """What became of a connection: `why` it has ended, if it is known; what was `said` on stderr.

    pid         the program, as long as it runs
    is_closing  it is we who end the connection
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self.why = ""
        self.said = b""
        self.pid: int | None = None
        self.is_closing = False
        self._on_end = on_end

    def end(self, why: str) -> None:
        """Note that nothing more can come, unless we have closed the connection ourselves."""
        if not self.is_closing:
            self.why = self.why or why
            self._on_end()

    def kill(self) -> None:
        """Kill the program, with all that it has started."""
        if self.pid is not None:
            signal_group(self.pid, signal.SIGKILL)


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signal a program and all that it has started, if it is there."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
