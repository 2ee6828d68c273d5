"""The server of the chat's pages: whoever has the secret may open one, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import signal
import socket
import sys
from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from pathlib import Path

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from textual_serve.server import Server, to_int

from m7mlx.terminal import one_line
from m7mlx_chat.engine import Engine
from m7mlx_chat.web.page import Page
from m7mlx_chat.web.shared import SharedEngine

_PAGES = 4  # each is a process; one model answers them in turn
_CONNECTIONS = 64
_IDLE_SECONDS = 10.0  # for a connection without a request
_MESSAGE = 4 << 20  # bytes: the longest message of a page, a paste say
# Keys go to the terminal without a click before, once textual.js has made it; and of what the chat
# says to the page, textual.js passes over the title.
_SCRIPT = """
addEventListener("load", () => document.querySelector(".xterm-helper-textarea").focus());
const Plain = WebSocket;
WebSocket = class extends Plain {
  constructor(address) {
    super(address);
    this.addEventListener("message", ({data}) => {
      const [what, text] = typeof data === "string" ? JSON.parse(data) : [];
      if (what === "title") document.title = text;
    });
  }
};
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>m7mlx</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/static/css/xterm.css">
<style>
body {{ background: #121212; overflow: hidden; }}
#ended {{ display: none; position: fixed; inset: auto 0 0; padding: .6rem 1rem; background: #333; color: #eee; }}
#ended, #ended a {{ font: 1rem system-ui, sans-serif; color: #eee; z-index: 10; }}
body.-closed #ended {{ display: block; }}
</style>
<script src="/static/js/textual.js"></script>
<script>{script}</script>
</head>
<body>
<div id="terminal" class="textual-terminal" data-session-websocket-url="ws://{host}/ws" data-font-size="16"></div>
<div id="ended">This chat has ended. <a href="/">Open another</a></div>
</body>
</html>
"""
_TEXT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>m7mlx</title></head>
<body style="font: 1rem system-ui, sans-serif; margin: 3rem"><p>{text}</p></body></html>
"""
_UNKNOWN = (
    "This chat is for who has its secret address: the one that m7mlx-chat printed when it started. "
    'If you have just opened it, <a href="/">go on</a>.'
)
_FULL = (
    f"{_PAGES} chats are open, and one model answers them in turn. "
    'Close the page of one, then <a href="/">try again</a>.'
)


def run(bound: socket.socket, command: Sequence[str], copies: Path | None) -> None:
    """Serve on a bound socket until Ctrl-C or SIGTERM, with a chat of `command` for each page.

    One engine, in this process, answers all of them.
    """
    engine = SharedEngine(Engine(copies=copies))
    engine.start()
    try:
        asyncio.run(ChatServer(bound, command, engine).run())
    finally:
        engine.close()


class ChatServer(Server):
    """textual-serve's server, for one person's pages."""

    def __init__(self, bound: socket.socket, command: Sequence[str], engine: SharedEngine) -> None:
        host, port = bound.getsockname()
        super().__init__("", host=host, port=port, title="m7mlx")
        self._bound = bound
        self._arguments = command
        self._engine = engine
        self._hosts = {f"{name}:{port}" for name in (host, "localhost")} | (
            {host, "localhost"} if port == 80 else set()
        )
        self._secret = secrets.token_urlsafe(32)
        self._cookie = f"m7mlx-{port}"
        self._pages: set[Page] = set()
        self._known: set[RequestHandler] = set()  # connections of who has the secret

    async def run(self) -> None:
        # nothing that a stranger sends makes us write
        logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        runner = web.AppRunner(
            await self._make_app(),
            access_log=None,
            keepalive_timeout=_IDLE_SECONDS,
            lingering_time=1,
            shutdown_timeout=1,
        )
        await runner.setup()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._end, ended)
        server = await loop.create_server(lambda: self._connection(runner.server), sock=self._bound)
        address = f"http://{self.host}:{self.port}/?key={self._secret}"
        print(f"m7mlx-chat is at {address} for you alone: keep the address secret; Ctrl-C ends it", file=sys.stderr)
        await ended.wait()
        server.close()
        await asyncio.gather(*(page.stop() for page in self._pages))
        await runner.cleanup()

    def _end(self, ended: asyncio.Event) -> None:
        if ended.is_set():  # once more: at once
            for page in self._pages:
                page.kill()
        ended.set()

    def _connection(self, server: web.Server | None) -> asyncio.BaseProtocol:
        """A new connection.

        Where there are too many, the oldest of a stranger goes, or the new one.
        """
        assert server is not None
        self._known.intersection_update(server.connections)
        if len(server.connections) >= _CONNECTIONS:
            strangers = [connection for connection in server.connections if connection not in self._known]
            if not strangers:
                return _Refused()
            strangers[0].force_close()
        return server()

    async def _make_app(self) -> web.Application:
        app = web.Application(middlewares=[self._admit])
        app.on_response_prepare.append(self._add_headers)
        app.router.add_get("/", self._index)
        app.router.add_get("/ws", self._talk)
        app.router.add_get("/download/{key}", self.handle_download)
        app.router.add_static("/static", self.statics_path)
        return app

    # --- who may come in --------------------------------------------------------------------------

    @web.middleware
    async def _admit(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """Answer whoever has the secret, and no page of another site, which could get here, too."""
        hosts, origins = request.headers.getall("Host", []), request.headers.getall("Origin", [])
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            raise web.HTTPForbidden(text="only this machine's own names are answered")
        if origins and origins != [f"http://{hosts[0].lower()}"]:
            raise web.HTTPForbidden(text="only pages of this server itself are answered")
        if request.path == "/" and self._is_secret(request.query.get("key", "")):
            found = web.HTTPSeeOther("/")
            found.set_cookie(self._cookie, self._secret, path="/", httponly=True, samesite="Strict")
            raise found
        if not self._is_secret(request.cookies.get(self._cookie, "")):
            return web.Response(status=401, text=_TEXT.format(text=_UNKNOWN), content_type="text/html")
        self._known.add(request.protocol)
        try:
            return await handler(request)
        except (web.HTTPException, asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:
            print(
                f"m7mlx-chat: error: a page failed: {one_line(f'{type(error).__name__}: {error}')}", file=sys.stderr
            )
            raise web.HTTPInternalServerError from None

    def _is_secret(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._secret.encode())

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say what a browser may do with an answer: run our scripts only, and use any styles."""
        script = b64encode(sha256(_SCRIPT.encode()).digest()).decode()
        sockets = " ".join(f"ws://{host}" for host in sorted(self._hosts))
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; script-src 'self' 'sha256-{script}'; style-src 'self' 'unsafe-inline'; "
            f"font-src 'self'; img-src 'self' data:; connect-src 'self' {sockets}; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        response.headers["X-Frame-Options"] = "DENY"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["Cache-Control"] = "no-store"

    # --- the pages --------------------------------------------------------------------------------

    async def _index(self, request: web.Request) -> web.Response:
        if self._is_full:
            return _full()
        return web.Response(text=_PAGE.format(host=request.host, script=_SCRIPT), content_type="text/html")

    async def _talk(self, request: web.Request) -> web.StreamResponse:
        """A page's websocket: a chat begins with it, and ends with it."""
        if self._is_full:
            return _full()
        websocket = web.WebSocketResponse(timeout=2, heartbeat=15, max_msg_size=_MESSAGE)
        page = Page(self._arguments, self._engine, websocket, self.download_manager)
        self._pages.add(page)
        columns, rows = to_int(request.query.get("width", ""), 80), to_int(request.query.get("height", ""), 24)
        try:
            await websocket.prepare(request)
            with contextlib.suppress(ConnectionError):
                await page.serve(columns, rows)
        except (ValueError, RecursionError):
            await websocket.close(code=1003)
        finally:
            self._pages.discard(page)
        return websocket

    @property
    def _is_full(self) -> bool:
        return sum(page.is_alive for page in self._pages) >= _PAGES


def _full() -> web.Response:
    return web.Response(status=503, text=_TEXT.format(text=_FULL), content_type="text/html")


class _Refused(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
