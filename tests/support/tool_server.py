"""A server of tools, made with the SDK: over stdin and stdout, or by HTTP on the port given."""

from __future__ import annotations

import sys
import time

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("test")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def fail() -> str:
    """Raise an error."""
    raise ToolError("it \x1b[2J broke")


@server.tool(structured_output=False)
def picture() -> Image:
    """Give a picture."""
    return Image(data=b"x" * 30, format="png")


@server.tool()
def much(size: int) -> str:
    """Give a long text."""
    return "x" * size


@server.tool()
def sleep(seconds: float) -> str:
    """Give an answer late."""
    time.sleep(seconds)
    return "awake"


@server.tool()
def die() -> str:
    """End the server."""
    print("Traceback …\nout of luck", file=sys.stderr, flush=True)
    sys.stderr.flush()
    import os

    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
