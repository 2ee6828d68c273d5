"""One connection: how long it may take to say what it wants, and how it ends.

uvicorn waits for a request's headers as long as a client likes. Here an idle or dribbling
connection is closed and one too many is refused, with errors as OpenAI's clients read them. A
client that has sent all and closed its half of the connection gets its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from m7mlx_serve.errors import ApiError
from m7mlx_serve.turns import Turns
from m7mlx_serve.uvicorn_adapter import HttpConnection

HEADER_SECONDS = 30.0  # for headers, from a connection's beginning or the end of an answer
UNSURE_SECONDS = 60.0  # for an answer while nothing can tell whether its client is there
WRITE_SECONDS = 60.0  # for a client that does not read what it asked for
# More than `admission` lets through; each line takes time to parse.
HEADER_BYTES, HEADER_LINES = 20 << 10, 120
_READ = 64 << 10  # bytes read from a connection at a time
_SLICE = 512  # bytes parsed at a time
_PROBE_SECONDS, _LOOK_SECONDS = 10.0, 1.0


class ConnectionConfig(uvicorn.Config):
    """uvicorn's configuration, and what connections share: turns, and a bound on their number."""

    def __init__(self, app: ASGIApp, turns: Turns, most_connections: int, **options: Any) -> None:
        super().__init__(app, http=Connection, **options)
        self.turns, self.most_connections = turns, most_connections


class Connection(HttpConnection):
    """One connection, with bounds."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, ConnectionConfig)
        self._turns, self._most_connections = config.turns, config.most_connections
        self._unread = bytearray()  # arrived, and not parsed yet
        self._has_turn = False
        self._half_closed = False  # the client sends nothing more
        self._probed = self._unsure_until = 0.0
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None  # since nothing can be written
        self._presence_timer: asyncio.TimerHandle | None = None  # while the client may have gone

    # --- what arrives -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin to wait for headers, or refuse one connection too many."""
        super().connection_made(transport)
        with contextlib.suppress(OSError):  # the client has gone already
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(transport, "max_size"):  # asyncio's, which reads four times as much
            transport.max_size = _READ
        if len(self.connections) > self._most_connections:
            self._refuse(ApiError(503, "too many connections are open; try again later", "too_many_connections"))
        else:
            self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        """Keep what has arrived until it is this connection's turn."""
        self._unread += data
        if len(self._unread) >= _READ:
            self.transport.pause_reading()
        self._ask_for_a_turn()

    def parse_some(self) -> None:
        """Parse a little of what has arrived."""
        self._has_turn = False
        if self.transport.is_closing():
            self._unread.clear()
            return
        size = 8 * _SLICE if self.reads_body and not self.reads_chunks else _SLICE
        data = bytes(self._unread[:size])
        del self._unread[:size]
        self.parse(data)
        self._ask_for_a_turn()
        if not self._unread:
            if not self.flow.read_paused:
                self.transport.resume_reading()
            if self._half_closed:
                self._answer_or_close()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn returns None
        """Take note that the client has closed its half; return whether ours stays open."""
        self._half_closed = True
        self._answer_or_close()
        return not self.transport.is_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all timers."""
        self._stop_header_timer()
        super().connection_lost(exc)
        for timer in (self._write_timer, self._presence_timer):
            if timer is not None:
                timer.cancel()

    def _ask_for_a_turn(self) -> None:
        """Ask for a turn, unless what has arrived is the next request, which has to wait."""
        if self._unread and not self._has_turn and (self.reads_headers or self.reads_body):
            self._has_turn = True
            self._turns.add(self)

    # --- requests and answers ---------------------------------------------------------------------

    def headers_may_be_parsed(self) -> bool:
        """Refuse headers of too many lines."""
        data = self.unparsed_headers
        ends = [end for mark in (b"\n\r\n", b"\n\n") if (end := data.find(mark)) >= 0]
        if data.count(b"\n", 0, min(ends, default=len(data))) <= HEADER_LINES:
            return True
        self._refuse(ApiError(431, f"headers must not have more than {HEADER_LINES} lines", "headers_too_large"))
        return False

    def headers_parsed(self) -> None:
        """Stop waiting for headers; bodies have a time of their own."""
        self._stop_header_timer()

    def answer_ends(self) -> None:
        """Begin to wait for the next headers."""
        self._start_header_timer()

    def answer_ended(self) -> None:
        """Go on with what has arrived, or close."""
        self._ask_for_a_turn()
        if self._half_closed and self.cycle.response_complete:
            self._answer_or_close()

    def not_http(self) -> None:
        """Refuse what is no HTTP, or has headers too large to parse."""
        if len(self.unparsed_headers) > HEADER_BYTES:
            self._refuse(ApiError(431, f"headers must not exceed {HEADER_BYTES:,} bytes", "headers_too_large"))
        else:
            self._refuse(ApiError(400, "this is not HTTP as this server understands it", "bad_request"))

    def _refuse(self, error: ApiError) -> None:
        self.send_and_close(error.status, json.dumps(error.body()).encode())

    # --- a client that has closed its half, or has gone -------------------------------------------

    def _answer_or_close(self) -> None:
        """Close, unless there is an answer to wait for: the client may still read."""
        if not self.is_answering:
            if not self._unread:
                self.transport.close()
        elif self._presence_timer is None:
            self._look_for_the_client()

    def _look_for_the_client(self) -> None:
        """Find out whether the client that has closed its half is still there.

        Only sending tells: the system of a client that has gone refuses what is sent. Before an
        answer, "100 Continue" may be said at any time and is ignored; but not to a client of
        HTTP/1.0, who is answered soon or not at all.
        """
        self._presence_timer = None
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        now, soon = self.loop.time(), _LOOK_SECONDS
        if self.answer_has_begun:
            pass  # the answer itself tells
        elif self.speaks_http_1_0:
            if now > (self._unsure_until or now):
                self.transport.abort()
                return
            self._unsure_until = self._unsure_until or now + UNSURE_SECONDS
        elif now - self._probed >= _PROBE_SECONDS:
            self._probed, soon = now, _LOOK_SECONDS / 20
            self.send_continue()
        self._presence_timer = self.loop.call_later(soon, self._look_for_the_client)

    # --- timers -----------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Give up a client that does not read for too long."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Take note that the client reads again."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _start_header_timer(self) -> None:
        self._stop_header_timer()
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._headers_are_late)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_are_late(self) -> None:
        if self._unread or self.unparsed_headers:  # the client has begun to ask
            self._refuse(ApiError(408, f"the headers did not come within {HEADER_SECONDS:.0f} seconds"))
        else:
            self.transport.close()
