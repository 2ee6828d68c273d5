"""How every command starts: Ctrl-C is heard before anything large is imported.

Importing a command takes most of a second. Nothing needs to be tidied up in that time, so Ctrl-C
ends the process at once. This module imports nothing of the project.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from importlib import import_module
from types import FrameType

_INTERRUPTED = 130  # the exit status after Ctrl-C


def run_command(module: str) -> int:
    """Import a module and run its `main()`; returns the exit status.

    Ctrl-C ends the process with status 130 while the module is imported and after `main` has
    returned. What `main` does not catch itself is a KeyboardInterrupt, for the caller. A process
    that was started to ignore Ctrl-C goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return _import_main(module)()
    signal.signal(signal.SIGINT, _leave)
    try:
        main = _import_main(module)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return main()
    finally:
        signal.signal(signal.SIGINT, _leave)  # while Python ends


def _import_main(module: str) -> Callable[[], int]:
    main: Callable[[], int] = import_module(module).main
    return main


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(_INTERRUPTED)
