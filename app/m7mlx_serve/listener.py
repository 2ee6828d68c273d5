"""Where connections come in, how many there may be, and how all of them end.

uvicorn takes as many connections as come, and cuts off what is under way when the time to end has
run out. Here one too many is refused, and streams that cannot finish in time get a last event that
says why they end.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp

from m7mlx_serve.connection import HEADER_BYTES, HEADER_SECONDS, ConnectionConfig
from m7mlx_serve.errors import report
from m7mlx_serve.turns import Turns
from m7mlx_serve.uvicorn_adapter import SignalledServer

BACKLOG = 256  # connections that wait to be accepted
GRACE_SECONDS = 10.0  # for what is under way when the server is told to end
_LAST_SECONDS = 5.0  # for last events to be read
_FILES = 64  # kept for all but connections, and for those that are accepted only to be refused
_AT_ONCE = 16  # connections accepted in one turn of the loop


def most_connections() -> int:
    """Return how many connections there are file numbers for."""
    return max(16, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES, 1024))


class Listener(SignalledServer):
    """Serves an ASGI application until it is told to end.

    SIGTERM or SIGINT ends it: what is under way may go on for a while, and what has not finished by
    then is told that the server shuts down. A second signal ends it at once.
    """

    def __init__(self, app: ASGIApp, cancel: Callable[[], object], connections: int | None = None) -> None:
        """`cancel` ends all answers, and may take a while; `connections` at most are open."""
        super().__init__(
            ConnectionConfig(
                app,
                Turns(),
                connections or most_connections(),
                ws="none",
                log_config=None,  # it would look at the standard streams, which may be closed
                log_level="critical",  # nothing of a conversation is in the logs, nor who asked when
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(GRACE_SECONDS + _LAST_SECONDS),
                timeout_keep_alive=int(HEADER_SECONDS),
                h11_max_incomplete_event_size=HEADER_BYTES,
                backlog=_AT_ONCE,
            )
        )
        self._cancel = cancel
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that leaves

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        asyncio.get_running_loop().set_exception_handler(_report_unhandled)
        await super().startup(sockets)
        for listener in sockets or []:
            # asyncio takes one number for the connections that wait and those it accepts at once.
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers finish; cancel those that have not finished after `GRACE_SECONDS`."""

        async def cancel() -> None:
            await asyncio.sleep(GRACE_SECONDS)
            await asyncio.to_thread(self._cancel)

        cancelling = asyncio.create_task(cancel())
        await super().shutdown(sockets)
        cancelling.cancel()


def _report_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report what no task has handled, without asyncio's traceback.

    An OSError is left out: when file numbers run out, asyncio tries again in a second.
    """
    error = context.get("exception")
    if isinstance(error, Exception) and not isinstance(error, OSError):
        report(error)
