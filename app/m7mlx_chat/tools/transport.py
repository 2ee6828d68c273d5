"""The bytes between the chat and a server of tools, within bounds.

The SDK's own way to a program holds a line of any length; here a line that is too long, or too many
that are no message, end the connection. Of what the program writes to stderr the end is kept, to
say why it failed.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import httpx2
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

from m7mlx_chat.servers import Server
from m7mlx_chat.tools.line import Line, signal_group

MOST_BYTES = 8 << 20  # of one message
_TOO_MUCH = f"it sent more than {MOST_BYTES >> 20} MB in one message"
_GARBAGE = 100  # lines that are no message
_KEPT = 2000  # bytes of what a program writes to stderr
_GRACE = 1.0  # seconds for a program to end by itself, and again after it was told to


@asynccontextmanager
async def to_program(server: Server, line: Line) -> AsyncIterator[Any]:
    """Start a server's program; gives the two streams that the SDK's client takes."""
    process = await asyncio.create_subprocess_exec(
        *server.command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=get_default_environment() | dict(server.env),
        limit=MOST_BYTES,
        start_new_session=True,  # Ctrl-C in a terminal is not for it; it ends with all it has started
    )
    line.pid = process.pid
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    come, coming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    going, gone = anyio.create_memory_object_stream[SessionMessage](0)
    tasks = [
        asyncio.create_task(_read(process.stdout, come, line)),
        asyncio.create_task(_write(process.stdin, gone)),
        asyncio.create_task(_listen(process.stderr, line)),
    ]
    try:
        yield coming, going
    finally:
        line.is_closing = True
        process.stdin.close()
        try:
            await _ended(process)
        finally:
            line.kill()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for stream in (come, coming, going, gone):
                stream.close()
            with suppress(TimeoutError):  # asyncio lets go of a pipe at its end
                await asyncio.wait_for(asyncio.gather(*map(_drain, (process.stdout, process.stderr))), _GRACE)
            await process.wait()
            line.pid = None


async def _read(stream: asyncio.StreamReader, come: Any, line: Line) -> None:
    garbage = 0
    why = "it has ended"
    try:
        while text := await stream.readline():
            try:
                message = SessionMessage(jsonrpc_message_adapter.validate_json(text, by_name=False))
            except ValueError:  # many programs print this and that at their start
                garbage += bool(text.strip())
                if garbage > _GARBAGE:
                    why = "what it says is no MCP"
                    break
                continue
            await come.send(message)
    except ValueError:  # asyncio's word for it
        why = _TOO_MUCH
    except (anyio.ClosedResourceError, anyio.BrokenResourceError):
        return
    finally:
        come.close()
    line.end(why)


async def _write(stream: asyncio.StreamWriter, gone: Any) -> None:
    with suppress(OSError, anyio.ClosedResourceError):
        async for message in gone:
            stream.write(message.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
            await stream.drain()


async def _listen(stream: asyncio.StreamReader, line: Line) -> None:
    while data := await stream.read(1 << 16):
        line.said = (line.said + data)[-_KEPT:]


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Wait a while for a program to end, now that its stdin is closed; then tell it to."""
    for number in (signal.SIGTERM, None):
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(process.wait()), _GRACE)
            return
        if number is not None:
            signal_group(process.pid, number)


@asynccontextmanager
async def to_address(server: Server, line: Line) -> AsyncIterator[Any]:
    """Reach a server by HTTP; gives the two streams that the SDK's client takes."""

    async def bound(response: Any) -> None:
        """Have a body end where it is too long; the events of a stream are bounded apart."""
        if response.headers.get("content-encoding", "identity") != "identity":
            line.end("its answer is packed, which was not asked for")
            raise httpx2.RemoteProtocolError(line.why)
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            response.stream = _Bounded(response.stream, line)

    headers = {"accept-encoding": "identity"} | dict(server.headers)
    timeout = httpx2.Timeout(server.timeout, read=2 * server.timeout)
    async with (
        httpx2.AsyncClient(headers=headers, timeout=timeout, event_hooks={"response": [bound]}) as client,
        streamable_http_client(server.url, http_client=client, max_sse_event_size=MOST_BYTES) as streams,
    ):
        yield streams


class _Bounded(httpx2.AsyncByteStream):  # type: ignore[misc, unused-ignore]  # without the extra it is Any
    """The body of a response, up to `MOST_BYTES`."""

    def __init__(self, stream: Any, line: Line) -> None:
        self._stream, self._line = stream, line

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = MOST_BYTES
        async for data in self._stream:
            left -= len(data)
            if left < 0:
                self._line.end(_TOO_MUCH)
                raise httpx2.RemoteProtocolError(_TOO_MUCH)
            yield data

    async def aclose(self) -> None:
        await self._stream.aclose()
