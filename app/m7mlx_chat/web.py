"""The chat in a browser on the same machine: textual-serve, bound to the loopback address."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from m7mlx.errors import InputError, RunError

_HOST = "127.0.0.1"


def in_browser() -> bool:
    """Whether the screen is a browser's page: textual-serve has started this process."""
    return "TEXTUAL_DRIVER" in os.environ


def serve(arguments: Sequence[str], port: int) -> int:
    """Serve until Ctrl-C; each page that is opened runs a chat of its own, with the same `arguments` but --web."""
    if not 0 < port < 1 << 16:
        raise InputError(f"--port must lie between 1 and 65535, not {port}")
    try:
        from textual_serve.server import Server
    except ImportError:
        raise InputError("--web needs the extra web: pip install 'm7mlx[web]'") from None

    class Guarded(Server):
        """A server that answers pages of its own only."""

        async def _make_app(self) -> Any:
            app = await super()._make_app()
            app.middlewares.append(_guard(port))
            return app

    passed = [argument for argument in arguments if argument != "--web"]
    command = shlex.join([sys.executable, "-m", "m7mlx_chat", "--interactive", *passed])
    print(f"m7mlx-chat is at http://{_HOST}:{port} for this machine alone; Ctrl-C ends it", file=sys.stderr)
    try:
        Guarded(command, host=_HOST, port=port, title="m7mlx").serve()
    except OSError as error:
        raise RunError(f"port {port} cannot be opened ({error.strerror}); choose another with --port") from None
    return 0


def _guard(port: int) -> Any:
    """Refuse what another site's page sends here: any page in the browser can reach the loopback address, and a chat
    reads and writes the user's files."""
    from aiohttp import web

    ours = {f"{host}:{port}" for host in (_HOST, "localhost")}

    @web.middleware
    async def guard(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
        origin = request.headers.get("Origin")
        if request.host not in ours or (origin is not None and origin.removeprefix("http://") not in ours):
            raise web.HTTPForbidden(text="only pages of this server itself are answered")
        return await handler(request)

    return guard
