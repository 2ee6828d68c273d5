"""Whether arguments fit a tool's schema. Both come from strangers, and a pattern can take for ever.

So it is found out in a process of its own, which the operating system bounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from m7mlx.errors import WorkerError
from m7mlx.worker import Worker

_MEMORY = 256 << 20
_SECONDS, _BUSY = 2.0, 5  # of the processor; times as many of the clock, on a busy machine


class Checker:
    """Checks arguments in a process that lives as long as this object is open."""

    def __init__(self) -> None:
        self._worker = Worker("m7mlx_chat.tools.check_process", memory=_MEMORY)

    def wrong(self, schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
        """What is wrong with the arguments, in a line; "" if they fit."""
        question = json.dumps([schema, arguments]).encode()
        try:
            return self._worker.ask(question, _SECONDS * _BUSY, _SECONDS).decode()
        except WorkerError:
            return "they could not be checked: the tool's schema asks for too much"

    def close(self) -> None:
        """End the process."""
        self._worker.close()
