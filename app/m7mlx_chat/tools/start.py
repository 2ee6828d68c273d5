"""The beginning of the tools: where there are servers, and the extra is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx_chat.events import AnyTools, NoTools
from m7mlx_chat.servers import Server
from m7mlx_chat.tools.allowed import Allowed


def start_tools(servers: Sequence[Server], allowed: Allowed, approvals: Path | None) -> AnyTools:
    """Start the servers that are wanted. Raises InputError without the extra, or for a wrong name.

    approvals  the file of what the user has said of tools; None keeps that in memory
    """
    allowed.check(servers)
    if not any(map(allowed.wants, servers)):
        return NoTools()
    if find_spec("mcp") is None:
        raise InputError("tools need the extra tools: pip install 'm7mlx[tools]'")
    from m7mlx_chat.tools.toolbox import Toolbox  # the SDK takes half a second

    return Toolbox(servers, allowed, approvals)
