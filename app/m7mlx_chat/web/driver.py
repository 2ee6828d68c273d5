"""The driver of a chat in a browser, named to Textual by `m7mlx_chat.web.page`."""

from __future__ import annotations

import contextlib
import os
import threading

from m7mlx_chat.textual_internals import OpenWebDriver

# for the answer under way to be kept; then the process ends as it is: nothing is lost by that
# either
_SECONDS = 15.0


class ServedDriver(OpenWebDriver):
    """Ends the chat when standard input ends: with the page, or with the server."""

    def send(self, data: bytes) -> int:
        with contextlib.suppress(OSError):  # nobody reads any more: input has ended, too
            os.write(self.fileno, data)
        return len(data)

    def run_input_thread(self) -> None:
        super().run_input_thread()
        if not self.exit_event.is_set():
            last = threading.Timer(_SECONDS, os._exit, (1,))
            last.daemon = True
            last.start()
            self.leave_app()
