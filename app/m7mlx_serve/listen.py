"""Connections: how many, how long each may take to say what it wants, and how all of them end.

uvicorn waits for a request's headers as long as a client likes, takes as many connections as come, and cuts off what
is under way when the time to end has run out. Here an idle or dribbling connection is closed, one too many is told,
and streams that cannot finish in time get a last event that says why they end. A client that has sent all and closed
its half of the connection gets its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from m7mlx_serve.guard import ApiError, report

HEADER_SECONDS = 30.0  # from a connection's beginning, or the end of an answer, to the end of the next headers
UNSURE_SECONDS = 60.0  # that an answer is worked at while nothing can tell whether its client is there
WRITE_SECONDS = 60.0  # for a client that does not read what it asked for
HEADER_BYTES, HEADER_LINES = 20 << 10, 120  # more than `guard` lets through; parsing takes time with each line
GRACE_SECONDS = 10.0  # for what is under way when the server is told to end
_LAST_SECONDS = 5.0  # for last events to be read
_FILES = 64  # kept for everything but connections, those that are just accepted to be refused among it
_AT_ONCE = 16  # connections accepted in one turn of the loop
BACKLOG = 256  # connections that wait to be accepted
_READ = 64 << 10  # bytes read from a connection at a time
_SLICE, _TURN_SECONDS = 512, 0.003  # bytes parsed at a time, and for how long in one turn of the loop
_PROBE_SECONDS, _LOOK_SECONDS = 10.0, 1.0


def most_connections() -> int:
    """As many as there are file numbers for."""
    return max(16, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES, 1024))


class Turns:
    """What has come is parsed a little at a time, for a few milliseconds in each turn of the loop, headers first.

    A read full of chunks of one byte would take the loop a tenth of a second, and each connection may send one.
    """

    def __init__(self) -> None:
        self._heads: deque[Connection] = deque()
        self._bodies: deque[Connection] = deque()
        self._coming = False  # the next turn

    def add(self, connection: Connection) -> None:
        (self._heads if connection.conn.their_state is h11.IDLE else self._bodies).append(connection)
        if not self._coming:
            self._coming = True
            connection.loop.call_soon(self._take, connection.loop)

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        until = time.perf_counter() + _TURN_SECONDS
        while (queue := self._heads or self._bodies) and time.perf_counter() < until:
            queue.popleft().parse()
        self._coming = bool(queue)
        if self._coming:
            loop.call_soon(self._take, loop)


class Connection(H11Protocol):
    """uvicorn's, with bounds, and with OpenAI's errors."""

    _patience: asyncio.TimerHandle | None = None  # for headers
    _stalled: asyncio.TimerHandle | None = None  # nothing can be written since
    _looking: asyncio.TimerHandle | None = None  # whether the client is there that has closed its half
    _most = most_connections()

    def __init__(self, turns: Turns, **given: Any) -> None:
        super().__init__(**given)
        self._turns = turns
        self._unread = bytearray()  # not parsed yet
        self._queued = False  # for a turn
        self._ended = False  # the client sends nothing more
        self._probed = self._unsure_until = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        with contextlib.suppress(OSError):  # it has gone already
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(transport, "max_size"):  # asyncio reads four times as much
            transport.max_size = _READ
        if len(self.connections) > self._most:
            self._refuse(ApiError(503, "too many connections are open; try again later", "too_many_connections"))
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        self._unread += data
        if len(self._unread) >= _READ:
            self.transport.pause_reading()
        self._go_on()

    def _go_on(self) -> None:
        """Have parsed what there is, unless it is the next request, whose turn comes when this one is answered."""
        if self._unread and not self._queued and self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._queued = True
            self._turns.add(self)

    def parse(self) -> None:
        """Parse a little of it."""
        self._queued = False
        if self.transport.is_closing():
            self._unread.clear()
            return
        is_plain = self.conn.their_state is h11.SEND_BODY and not self._is_chunked()
        size = 8 * _SLICE if is_plain else _SLICE
        data = bytes(self._unread[:size])
        del self._unread[:size]
        super().data_received(data)
        self._go_on()
        if not self._unread:
            if not self.flow.read_paused:
                self.transport.resume_reading()
            if self._ended:
                self._serve_out()

    def _is_chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers)

    def eof_received(self) -> bool:  # type: ignore[override]
        self._ended = True
        self._serve_out()
        return not self.transport.is_closing()

    def _serve_out(self) -> None:
        """Close, unless there is an answer to wait for: the client may have closed its half only, or have gone."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            if not self._unread:
                self.transport.close()
        elif self._looking is None:
            self._look()

    def _look(self) -> None:
        """Look whether the client that has closed its half is still there.

        Only what is sent tells: the system of one that has gone refuses it. Before an answer, "100 Continue" may be
        said at any time, and is not heeded; but not to a client of HTTP/1.0, who is answered soon or not at all.
        """
        self._looking = None
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        now, soon = self.loop.time(), _LOOK_SECONDS
        if self.conn.our_state is not h11.SEND_RESPONSE:
            pass  # the answer itself tells
        elif self.conn.their_http_version == b"1.0":
            if now > (self._unsure_until or now):
                self.transport.abort()
                return
            self._unsure_until = self._unsure_until or now + UNSURE_SECONDS
        elif now - self._probed >= _PROBE_SECONDS:
            self._probed, soon = now, _LOOK_SECONDS / 20
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        self._looking = self.loop.call_later(soon, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        for timer in (self._stalled, self._looking):
            if timer is not None:
                timer.cancel()

    def handle_events(self) -> None:
        if self.conn.their_state is h11.IDLE and self._lines() > HEADER_LINES:
            self._refuse(ApiError(431, f"headers must not have more than {HEADER_LINES} lines", "headers_too_large"))
            return
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
        self._go_on()
        if self._ended and self.cycle.response_complete:
            self._serve_out()

    def send_400_response(self, msg: str) -> None:
        large = self.conn.trailing_data[0] and len(self.conn.trailing_data[0]) > HEADER_BYTES
        self._refuse(
            ApiError(431, f"headers must not exceed {HEADER_BYTES:,} bytes", "headers_too_large")
            if large
            else ApiError(400, "this is not HTTP as this server understands it", "bad_request")
        )

    def _lines(self) -> int:
        """Of the headers that are there and not parsed yet."""
        data = self.conn.trailing_data[0]
        ends = [end for mark in (b"\n\r\n", b"\n\n") if (end := data.find(mark)) >= 0]
        return data.count(b"\n", 0, min(ends, default=len(data)))

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
        if self._unread or self.conn.trailing_data[0]:  # it has begun to ask
            self._refuse(ApiError(408, f"the headers did not come within {HEADER_SECONDS:.0f} seconds"))
        else:
            self.transport.close()


class Listener(uvicorn.Server):
    """SIGTERM or SIGINT ends it: what is under way may go on a while, the rest is told; another ends it at once."""

    def __init__(self, app: Any, cancel: Callable[[], object]) -> None:
        """`cancel` ends all answers; it may take a while."""
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, Turns()),  # type: ignore[arg-type]
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
        asyncio.get_running_loop().set_exception_handler(_told)
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # asyncio takes one number for those that wait and those it accepts at once

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


def _told(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """In the place of asyncio's tracebacks. When file numbers run out, it tries again in a second."""
    error = context.get("exception")
    if isinstance(error, Exception) and not isinstance(error, OSError):
        report(error)
