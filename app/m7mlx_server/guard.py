"""What stands before every request: who may ask, and how much they may send.

A server on the loopback address can be reached by any page open in the machine's browser: by a name of its own that
resolves to 127.0.0.1 (hence the Host check), and by requests that a browser sends without asking (hence Origin and
the content type).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
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

MAX_BODY = 8 << 20  # bytes
MAX_HEADERS, MAX_HEADER_BYTES = 100, 16 << 10
BODY_SECONDS = 30.0
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            _check_headers(scope, headers)
            self._check_caller(scope["path"], headers)
            if scope["method"] == "POST" and scope["path"] in self._posts:
                body = await self._body(headers, receive)
                receive = _replay(body, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

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

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON: Content-Type: application/json", "unsupported_media_type")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            raise ApiError(400, "Content-Length is not a number")
        if int(length) > MAX_BODY:
            raise ApiError(413, f"the body must not exceed {MAX_BODY:,} bytes", "too_large")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} seconds") from None
        return body


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


async def _read(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client has gone")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise ApiError(413, f"the body must not exceed {MAX_BODY:,} bytes", "too_large")
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece; after it, whatever comes (a disconnect)."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
