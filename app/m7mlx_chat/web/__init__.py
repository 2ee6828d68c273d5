"""The chat in a browser on the same machine, for whoever has the secret address."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from m7mlx.errors import InputError, RunError

_HOST = "127.0.0.1"


def serve(arguments: Sequence[str], port: int, copies: Path | None) -> int:
    """Serve until Ctrl-C: each page runs a chat of its own, with the same `arguments` but --web.

    One model answers all pages, in turn. Conversations are copied to `copies`, so that they go on
    at once the next time.
    """
    if not 0 < port < 1 << 16:
        raise InputError(f"--port must lie between 1 and 65535, not {port}")
    try:
        import textual_serve  # noqa: F401
    except ImportError:
        raise InputError("--web needs the extra web: pip install 'm7mlx[web]'") from None
    from m7mlx_chat.web.server import run

    try:
        bound = socket.create_server((_HOST, port))
    except OSError as error:
        raise RunError(f"port {port} cannot be opened ({error.strerror}); choose another with --port") from None
    passed = [argument for argument in arguments if argument != "--web"]
    with bound:
        run(bound, [sys.executable, "-m", "m7mlx_chat", "--interactive", *passed], copies)
    return 0
