"""Connections: how many, how long each may take to say what it wants, and how all of them end.

uvicorn waits for a request's headers as long as a client likes, takes as many connections as come, and cuts off what
is under way when the time to end has run out. Here an idle or dribbling connection is closed, one too many is told,
and streams that cannot finish in time get a last event that says why they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from m7mlx_server.guard import ApiError

HEADER_SECONDS = 30.0  # from a connection's beginning, or the end of an answer, to the end of the next headers
WRITE_SECONDS = 60.0  # for a client that does not read what it asked for
HEADER_BYTES = 64 << 10  # more than `guard` lets through, so that what is a little too large gets a proper answer
GRACE_SECONDS = 10.0  # for what is under way when the server is told to end
_LAST_SECONDS = 5.0  # for last events to be read
_FILES = 64  # kept for everything but connections


def most_connections() -> int:
    """As many as there are file numbers for."""
    return max(16, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES, 4096))


class Connection(H11Protocol):
    """uvicorn's, with bounds, and with OpenAI's errors."""

    _patience: asyncio.TimerHandle | None = None  # for headers
    _stalled: asyncio.TimerHandle | None = None  # nothing can be written since
    _most = most_connections()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._refuse(ApiError(503, "too many connections are open; try again later", "too_many_connections"))
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        if self._stalled is not None:
            self._stalled.cancel()

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._wait_no_more()  # the headers are there: bodies have a time of their own

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def on_response_complete(self) -> None:
        self._wait()  # first: what is asked already is read in the next line
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        large = self.conn.trailing_data[0] and len(self.conn.trailing_data[0]) > HEADER_BYTES
        self._refuse(
            ApiError(431, f"headers must not exceed {HEADER_BYTES:,} bytes", "headers_too_large")
            if large
            else ApiError(400, "this is not HTTP as this server understands it", "bad_request")
        )

    def _should_upgrade(self) -> bool:
        return False  # it is a request like any other

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request, and close."""
        data = json.dumps(error.body()).encode()
        status = h11.Response(
            status_code=error.status,
            reason=HTTPStatus(error.status).phrase.encode(),
            headers=[
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(data))),
                ("Connection", "close"),
            ],
        )
        with contextlib.suppress(h11.LocalProtocolError):  # in the middle of an answer there is nothing to say
            for event in (status, h11.Data(data=data), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait(self) -> None:
        self._wait_no_more()
        self._patience = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _wait_no_more(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        if self.conn.trailing_data[0]:  # it has begun to ask
            self._refuse(ApiError(408, f"the headers did not come within {HEADER_SECONDS:.0f} seconds"))
        else:
            self.transport.close()


class Listener(uvicorn.Server):
    """SIGTERM or SIGINT ends it: what is under way may go on a while, the rest is told; another ends it at once."""

    def __init__(self, app: Any, cancel: Callable[[], None]) -> None:
        """`cancel` ends all answers; it may take a while."""
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_level="critical",  # nothing of a conversation is in the logs, nor who asked when
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(GRACE_SECONDS + _LAST_SECONDS),
                timeout_keep_alive=int(HEADER_SECONDS),
                h11_max_incomplete_event_size=HEADER_BYTES,
            )
        )
        self._cancel = cancel
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that leaves

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async def cancel() -> None:
            await asyncio.sleep(GRACE_SECONDS)
            await asyncio.to_thread(self._cancel)

        cancelling = asyncio.create_task(cancel())
        await super().shutdown(sockets)
        cancelling.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._captured_signals.append(sig)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does it, but SIGTERM is how a server ends and not a failure: status 0."""
        with super().capture_signals():
            yield
            if signal.SIGTERM in self._captured_signals:
                self._captured_signals.clear()
