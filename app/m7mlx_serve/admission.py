"""What stands before every request: who may ask, and how much they may send.

A server on the loopback address can be reached by any page open in the machine's browser: under a
name of the page's own that resolves to 127.0.0.1 (hence the check of Host), and by requests that a
browser sends without asking (hence the checks of Origin and of the content type).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m7mlx_serve.bodies import MAX_BODY, SCOPE_KEY, Body, BodyRoom, too_large
from m7mlx_serve.endpoints import error_response
from m7mlx_serve.errors import ApiError

SPACE_KEY = "m7mlx.space"  # where a request's scope says whose it is; "" on a server without keys
MAX_HEADERS, MAX_HEADER_BYTES = 100, 16 << 10
_ONCE = ("authorization", "content-encoding", "content-type", "host", "origin", "x-api-key")  # h11 sees to lengths
_SCHEMES = ("http", "https")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?")
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
# What says that a body is JSON. Some programs say nothing, and curl calls it a form unless it is
# told otherwise; browsers send neither without Origin.
_JSON, _UNSAID = "application/json", ("", "application/x-www-form-urlencoded")
_OPEN = ("/", "/page.js", "/page.css", "/health")  # without a key


class Admission:
    """ASGI middleware that checks Host, Origin, key, content type and the body's size and time.

    posts    paths that bodies are sent to
    hosts    names that this server answers to, lower-case, without a port
    origins  pages that may ask, besides the server's own, lower-case
    keys     one of which `Authorization: Bearer …` must carry; without any, everybody is admitted
    """

    def __init__(
        self,
        app: ASGIApp,
        posts: Collection[str],
        hosts: Collection[str],
        keys: Collection[str],
        origins: Collection[str] = (),
    ) -> None:
        self._app, self._posts, self._hosts = app, frozenset(posts), frozenset(hosts)
        self._spaces = {key: _space(key) for key in keys}
        self._origins = frozenset(origins)
        self._room = BodyRoom()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request: refuse it, or hand it on with its body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body: Body | None = None
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and origin.lower() in self._origins:
            send = _allowing(origin, send)
        try:
            _check_headers(scope, headers)
            if scope["path"] != "/":  # some clients put a slash behind every address
                scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
            self._check_origin(headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(headers)(scope, receive, send)
                return
            scope[SPACE_KEY] = self._check_key(scope["path"], headers)
            if scope["method"] == "POST" and scope["path"] in self._posts:
                scope[SCOPE_KEY] = body = Body(self._room)
                await body.receive(receive, _largest_body(headers))
                if _is_compressed(headers):
                    await body.decompress()
                receive = _replay(body, receive)
        except ApiError as error:
            if body is not None:
                body.drop()
            await error_response(scope["path"], error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if body is not None:
                body.drop()

    def _check_origin(self, headers: Headers) -> None:
        if _host_name(headers.get("host", "")) not in self._hosts:
            raise ApiError(403, "this server does not answer to that Host", "forbidden_host")
        own = [f"{scheme}://{headers.get('host', '').lower()}" for scheme in _SCHEMES]
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (*own, *self._origins):
            reason = f"pages of other sites are not answered; --allow-origin {origin[:100]!r} would let this one in"
            raise ApiError(403, reason, "forbidden_origin")

    def _check_key(self, path: str, headers: Headers) -> str:
        """The space of the key that a request carries. Raises ApiError for one without."""
        if not self._spaces or path in _OPEN:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")  # Anthropic's clients
        known = [key for key in self._spaces if hmac.compare_digest(given.strip().encode(), key.encode())]
        if not known:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer …", "invalid_api_key")
        return self._spaces[known[0]]


def _space(key: str) -> str:
    """What the requests of a key have in common, and tells nothing of it."""
    return hashlib.sha256(b"m7mlx-space" + key.encode()).hexdigest()[:32]


def _largest_body(headers: Headers) -> int:
    """The most bytes that the body may have. Raises ApiError for a body that cannot be read."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_a_pages = "origin" in headers or "sec-fetch-site" in headers
    if kind != _JSON and (kind not in _UNSAID or is_a_pages):
        raise ApiError(415, "the body must be JSON: Content-Type: application/json", "unsupported_media_type")
    if "transfer-encoding" in headers or _is_compressed(headers):
        return MAX_BODY  # room for what comes of it
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise ApiError(400, "Content-Length is not a number")
    if int(length) > MAX_BODY:
        raise too_large()
    return int(length)


def _is_compressed(headers: Headers) -> bool:
    """Whether the body is compressed by gzip. Raises ApiError for any other encoding."""
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip", "x-gzip"):
        raise ApiError(415, "Content-Encoding must be gzip, or left out", "unsupported_media_type")
    return coding != "identity"


def _preflight(headers: Headers) -> Response:
    """The answer to a browser that asks, for a page of another origin, what it may send."""
    asked = headers.get("access-control-request-headers", "")
    names = [name.strip() for name in asked.split(",")]
    allowed = ", ".join(name for name in names if _HEADER_NAME.fullmatch(name))
    told = {"Access-Control-Allow-Methods": "GET, POST, DELETE", "Access-Control-Max-Age": "600"}
    return Response(status_code=204, headers=told | ({"Access-Control-Allow-Headers": allowed} if allowed else {}))


def _allowing(origin: str, send: Send) -> Send:
    """A `send` that lets a page of `origin` read what is answered."""

    async def allowing(message: Message) -> None:
        if message["type"] == "http.response.start":
            told = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
            message = {**message, "headers": [*message.get("headers", ()), *told]}
        await send(message)

    return allowing


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


def _host_name(host: str) -> str:
    """The name in a Host header, without the port; "" if the header is malformed.

    "localhost", "127.0.0.1", "[::1]".
    """
    found = _HOST.fullmatch(host.lower())
    return found[1] if found and int(found[2] or 0) < 1 << 16 else ""


def _replay(body: Body, receive: Receive) -> Receive:
    """A `receive` that tells the body in one piece and then whatever comes (a disconnect)."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body.take(), "more_body": False}

    return replay
