"""What stands before every request: who may ask, and how much they may send.

A server on the loopback address can be reached by any page open in the machine's browser: by a name of its own that
resolves to 127.0.0.1 (hence the Host check), and by requests that a browser sends without asking (hence Origin and
the content type).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import re
import select
import sys
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY, SMALL_BODY = 8 << 20, 64 << 10  # bytes
MAX_BODIES = 64 << 20  # of all that are larger than small
MAX_HEADERS, MAX_HEADER_BYTES = 100, 16 << 10
BODY_SECONDS = 30.0
COMING_SECONDS = 2.0  # that a large body may take while others wait for room
ROOM_SECONDS = 10.0  # that it waits itself
BODY = "m7mlx.body"  # of a request's scope, so that who has read it can drop it
_ONCE = ("authorization", "content-type", "host", "origin")  # h11 sees to lengths
_SCHEMES = ("http", "https")
_LINE = 400  # characters; a pipe that takes any takes 512
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?")
_OPEN = ("/", "/page.js", "/page.css", "/health")  # without a key


class ApiError(Exception):
    """An error as OpenAI's clients read it."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


def report(error: BaseException) -> None:
    """For whoever runs the server: what failed and where, without its message, which could be of a conversation.

    Nobody may read what is said, and a pipe that is full would hold up everybody: then it is not said.
    """
    places = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(place.filename).name}:{place.lineno}" for place in reversed(places))
    line = f"m7mlx-serve: a request failed: {type(error).__name__} at {where}"
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [sys.stderr], [], 0)[1]:
            print(line[:_LINE], file=sys.stderr)


class Guard:
    """ASGI middleware: Host, Origin, key, content type, and a body that is bounded in size and time.

    posts  paths that bodies are sent to
    hosts  names that this server answers to, lower-case, without a port
    key    what `Authorization: Bearer …` must carry; None for anybody
    """

    def __init__(self, app: ASGIApp, posts: Collection[str], hosts: Collection[str], key: str | None) -> None:
        self._app, self._posts, self._hosts, self._key = app, frozenset(posts), frozenset(hosts), key
        self._bodies = Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body: Body | None = None
        try:
            headers = Headers(scope=scope)
            _check_headers(scope, headers)
            self._check_caller(scope["path"], headers)
            if scope["method"] == "POST" and scope["path"] in self._posts:
                scope[BODY] = body = Body(self._bodies)
                await body.receive(receive, _size(headers))
                receive = _replay(body, receive)
        except ApiError as error:
            if body is not None:
                body.drop()
            await error.response()(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if body is not None:
                body.drop()

    def _check_caller(self, path: str, headers: Headers) -> None:
        if _name(headers.get("host", "")) not in self._hosts:
            raise ApiError(403, "this server does not answer to that Host", "forbidden_host")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in [
            f"{s}://{headers.get('host', '').lower()}" for s in _SCHEMES
        ]:
            raise ApiError(403, "pages of other sites are not answered", "forbidden_origin")
        if self._key is not None and path not in _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
                raise ApiError(401, "a valid API key is needed: Authorization: Bearer …", "invalid_api_key")


class Bodies:
    """What all bodies that are held take together. Each is held until it has been read (`Body.drop`).

    Small ones are not counted: they always find room. A large one waits in a line until there is room for all of it;
    the one that has been coming longest gives way, once it has had its time.
    """

    def __init__(self) -> None:
        self._held: dict[Body, int] = {}  # large ones, and what room they have
        self._line = asyncio.Lock()
        self._freed = asyncio.Event()

    async def make_room(self, body: Body, size: int) -> None:
        """Wait until `body` may have so many bytes. Raises ApiError if that takes too long."""
        if size <= SMALL_BODY:
            return
        try:
            async with asyncio.timeout(ROOM_SECONDS), self._line:
                while sum(self._held.values()) + size > MAX_BODIES:
                    late = asyncio.get_running_loop().time() - COMING_SECONDS
                    if slow := next((held for held in self._held if held.coming_since < late), None):
                        slow.give_way()
                    self._freed.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._freed.wait(), 0.1)
        except TimeoutError:
            raise _no_room() from None
        self._held[body] = size

    def forget(self, body: Body) -> None:
        self._held.pop(body, None)
        self._freed.set()


class Body:
    """The body of a request, as it comes."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self._parts = bodies, list[bytes]()
        self._clock: asyncio.Timeout | None = None
        self._gave_way = False
        self.coming_since = math.inf

    async def receive(self, receive: Receive, size: int) -> None:
        """Raises ApiError for one that is larger than `size`, or does not come in time."""
        await self._bodies.make_room(self, size)
        self.coming_since = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(BODY_SECONDS) as self._clock:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client has gone")
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size -= len(part)
                    if size < 0:
                        raise _too_large()
                    self._parts.append(part)
        except TimeoutError:
            if self._gave_way:
                raise _no_room() from None
            raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} seconds") from None
        self.coming_since = math.inf  # it has come

    def take(self) -> bytes:
        """All of it; once."""
        data = b"".join(self._parts)
        self._parts.clear()
        return data

    def drop(self) -> None:
        """It is held no longer."""
        self._parts.clear()
        self._bodies.forget(self)

    def give_way(self) -> None:
        """End its coming, in favour of another."""
        self._gave_way, self.coming_since = True, math.inf
        self.drop()
        assert self._clock is not None
        self._clock.reschedule(0)


def _no_room() -> ApiError:
    reason = "too many large bodies are under way; try again later"
    return ApiError(503, reason, "too_many_bodies", {"Retry-After": "5"})


def _too_large() -> ApiError:
    return ApiError(413, f"the body must not exceed {MAX_BODY:,} bytes", "too_large")


def _size(headers: Headers) -> int:
    """The most bytes that a body may have. Raises ApiError for one that cannot be read."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: Content-Type: application/json", "unsupported_media_type")
    if "transfer-encoding" in headers:
        return MAX_BODY
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise ApiError(400, "Content-Length is not a number")
    if int(length) > MAX_BODY:
        raise _too_large()
    return int(length)


def _check_headers(scope: Scope, headers: Headers) -> None:
    size = sum(len(name) + len(value) for name, value in headers.raw)
    if len(headers.raw) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        reason = f"at most {MAX_HEADERS} headers of together {MAX_HEADER_BYTES:,} bytes are read"
        raise ApiError(431, reason, "headers_too_large")
    for name in _ONCE:
        if len(headers.getlist(name)) > 1:
            raise ApiError(400, f"the header {name} is given twice", "bad_headers")
    if not scope["path"].startswith("/"):
        raise ApiError(400, "only paths of this server are answered: no other's address, no *", "bad_target")
    if "transfer-encoding" in headers and "content-length" in headers:
        reason = "a body has a Content-Length or a Transfer-Encoding, not both"
        raise ApiError(400, reason, "bad_framing", {"Connection": "close"})


def _name(host: str) -> str:
    """A Host header's name without its port: "localhost", "127.0.0.1", "[::1]"; "" for what is no such header."""
    found = _HOST.fullmatch(host.lower())
    return found[1] if found and int(found[2] or 0) < 1 << 16 else ""


def _replay(body: Body, receive: Receive) -> Receive:
    """The body in one piece; after it, whatever comes (a disconnect)."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body.take(), "more_body": False}

    return replay
