"""What this server uses of uvicorn and h11 beyond what they document, under names of its own.

All that is known here of their insides stands on this page, for whoever compares it with a new
version of theirs.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from http import HTTPStatus
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


class HttpConnection(H11Protocol):
    """One HTTP/1.1 connection.

    A subclass says what happens when (the methods that do nothing here), and may hold back what
    arrives: `parse` takes it.
    """

    # --- what a subclass decides ------------------------------------------------------------------

    def headers_may_be_parsed(self) -> bool:
        """Whether to go on with the headers that have arrived; if not, they have been refused."""
        return True

    def headers_parsed(self) -> None:
        """The headers of a request have arrived and are parsed."""

    def answer_ends(self) -> None:
        """An answer has been sent; what has arrived of the next request is about to be parsed."""

    def answer_ended(self) -> None:
        """An answer has been sent, and what had arrived of the next request is parsed."""

    def not_http(self) -> None:
        """What has arrived is not HTTP, or its headers are too large."""

    # --- the state --------------------------------------------------------------------------------

    @property
    def reads_headers(self) -> bool:
        """Whether the headers of a request are next."""
        return self.conn.their_state is h11.IDLE

    @property
    def reads_body(self) -> bool:
        """Whether the body of a request, or more of it, is next."""
        return self.conn.their_state is h11.SEND_BODY

    @property
    def reads_chunks(self) -> bool:
        """Whether that body comes in chunks."""
        return self.reads_body and any(name == b"transfer-encoding" for name, _ in self.headers)

    @property
    def unparsed_headers(self) -> bytes:
        """What has arrived of headers that are not whole."""
        return self.conn.trailing_data[0]

    @property
    def is_answering(self) -> bool:
        """Whether a request has arrived whole and its answer has not been sent."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    @property
    def answer_has_begun(self) -> bool:
        """Whether the answer's status has been sent."""
        return self.conn.our_state is not h11.SEND_RESPONSE

    @property
    def speaks_http_1_0(self) -> bool:
        """Whether the request came by HTTP/1.0."""
        return self.conn.their_http_version == b"1.0"

    # --- what it can be told to do ----------------------------------------------------------------

    def parse(self, data: bytes) -> None:
        """Parse what has arrived."""
        super().data_received(data)

    def send_continue(self) -> None:
        """Say "100 Continue", which a client may ignore."""
        self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")

    def send_and_close(self, status: int, data: bytes) -> None:
        """Answer with JSON and close; amid another answer only close."""
        response = h11.Response(
            status_code=status,
            reason=HTTPStatus(status).phrase.encode(),
            headers=[
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(data))),
                ("Connection", "close"),
            ],
        )
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (response, h11.Data(data=data), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    # --- what uvicorn calls -----------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and the timer that uvicorn leaves running after an error."""
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Parse all that has arrived."""
        if self.reads_headers and not self.headers_may_be_parsed():
            return
        super().handle_events()
        if not self.reads_headers and self.conn.our_state is not h11.DONE:
            self.headers_parsed()

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        self.answer_ends()
        super().on_response_complete()
        self.answer_ended()

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 cannot parse."""
        self.not_http()

    def _should_upgrade(self) -> bool:
        return False  # a request to change the protocol is a request like any other


class SignalledServer(uvicorn.Server):
    """Ends when SIGTERM or SIGINT arrives, and at once when another does. SIGTERM is no failure."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._captured_signals.append(sig)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hold signals back while the server runs; afterwards raise them again, but not SIGTERM."""
        with super().capture_signals():
            yield
            if signal.SIGTERM in self._captured_signals:
                self._captured_signals.clear()
