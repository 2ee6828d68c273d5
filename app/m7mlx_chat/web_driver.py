"""The driver of a chat in a browser, named to Textual by `m7mlx_chat.web_session`."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

from textual.drivers.web_driver import WebDriver

_SECONDS = 15.0  # for the answer under way to be kept; then the process ends as it is: nothing is lost by that either


class ServedDriver(WebDriver):
    """Ends the chat when standard input ends: the page is closed, or the server has gone, however it went."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._write = self._send  # type: ignore[assignment]

    def _send(self, data: bytes) -> int:
        with contextlib.suppress(OSError):  # nobody reads any more: input has ended, too
            os.write(self.fileno, data)
        return len(data)

    def run_input_thread(self) -> None:
        super().run_input_thread()
        if not self.exit_event.is_set():
            last = threading.Timer(_SECONDS, os._exit, (1,))
            last.daemon = True
            last.start()
            self._loop.call_soon_threadsafe(self._app.exit)
