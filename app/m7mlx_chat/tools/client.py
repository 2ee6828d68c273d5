"""What is said to a server, in the words of the SDK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import mcp_types as types
from mcp import Client, MCPError
from pydantic import ValidationError

from m7mlx_chat.servers import Server
from m7mlx_chat.steps import Outcome
from m7mlx_chat.tools.line import Line
from m7mlx_chat.tools.results import text_of
from m7mlx_chat.tools.transport import to_address, to_program

_PAGES = 20  # of a server's list


@asynccontextmanager
async def connected(server: Server, line: Line) -> AsyncIterator[Client]:
    """Start or reach a server, and agree on the protocol."""
    async with Client(to_program(server, line) if server.command else to_address(server, line)) as client:
        yield client


async def listed(client: Client) -> list[tuple[str, str, dict[str, Any]]]:
    """The name, the description and the parameters of each tool."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    cursor: str | None = None
    for _ in range(_PAGES):
        page = await client.list_tools(cursor=cursor)
        found += [(tool.name, tool.description or "", tool.input_schema) for tool in page.tools]
        cursor = page.next_cursor
        if cursor is None:
            break
    return found


async def called(client: Client, name: str, arguments: Mapping[str, Any], seconds: float) -> tuple[Outcome, str]:
    """Call a tool: how that ended, and what it gave.

    Raises TimeoutError, and what the SDK raises.
    """
    request = types.CallToolRequest(params=types.CallToolRequestParams(name=name, arguments=dict(arguments)))
    try:
        # Not `call_tool`, which would match what comes with the server's own patterns.
        result = await asyncio.wait_for(client.session.send_request(request, types.CallToolResult), seconds)
    except ValidationError:
        return "failed", "what the tool gave is not what MCP knows"
    return "failed" if result.is_error else "given", text_of(result)


def told(error: BaseException | None) -> str:
    """What an error says; "" for one that says no more than that the server is not there."""
    if isinstance(error, ValidationError):
        return "what it says is not what MCP knows"
    if error is None or (isinstance(error, MCPError) and error.code == types.CONNECTION_CLOSED):
        return ""
    return str(error) or type(error).__name__
