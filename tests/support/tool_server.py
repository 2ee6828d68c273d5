"""A server of tools, made with the SDK: over stdin and stdout, or by HTTP on the port given."""

from __future__ import annotations

import os
import sys
import time

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def fail() -> str:
    """Raise an error."""
    raise ToolError("it \x1b[2J broke")


def picture() -> Image:
    """Give a picture."""
    return Image(data=b"x" * 30, format="png")


def much(size: int) -> str:
    """Give a long text."""
    return "x" * size


def sleep(seconds: float) -> str:
    """Give an answer late."""
    time.sleep(seconds)
    return "awake"


def die() -> str:
    """End the server."""
    print("Traceback …\nout of luck", file=sys.stderr, flush=True)
    os._exit(3)


if __name__ == "__main__":
    server = MCPServer("test")
    for function in (add, fail, much, sleep, die):
        server.add_tool(function)
    server.add_tool(picture, structured_output=False)
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
