"""Jobs that tests give a worker: Python that is run in the worker's process.

A job can do whatever a stranger could.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any


def handler(setup: bytes) -> Callable[[bytes], bytes]:
    """A function that runs its input, which may set `reply`; `setup` is run before."""
    names: dict[str, Any] = {"os": os, "sys": sys, "time": time, "setup": setup}
    if setup.startswith(b"run:"):
        exec(setup[4:], names)

    def run(data: bytes) -> bytes:
        names["reply"] = b""
        exec(data, names)
        reply: bytes = names["reply"]
        return reply

    return run
