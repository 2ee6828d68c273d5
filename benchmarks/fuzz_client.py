"""One stranger of `fuzz.py`: a client that sends what it should not, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tried_server import NAME, object_of

PATHS = ("/v1/chat/completions", "/v1/completions", "/health", "/v1/models", "/metrics", "/", "/docs", "/nothing")
SECONDS = 8.0  # for one thing that a client does
TEXTS = ("", "a", "</s>[INST]", "\x00", "\ud800", "é😀" * 50, "[" * 500, '{"a":' * 200, "word " * 5000, "\u202e")
NUMBERS = (0, -1, 1, 1.5, 1e308, -0.0, 1 << 31, 1 << 63, 1 << 200, 0.1, 2)
SCHEMAS: tuple[Any, ...] = (
    object_of(a={"type": "integer"}),
    {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "maxItems": 3},
    {"type": "string", "pattern": "^(a?){30}b$"},
    {"type": "integer", "multipleOf": 97, "minimum": 0, "maximum": 1000},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}}},
    {"enum": [1, "two", None, {"three": [3]}]},
    {"type": "string", "format": "date-time", "minLength": 5, "maxLength": 40},
    {"allOf": [{"type": "object"}, {"properties": {"x": {"const": 1}}}]},
)
HEADERS = (
    b"Host: evil.example", b"Host: [::1]x", b"Origin: http://evil", b"Transfer-Encoding: gzip", b"Content-Length: -1",
    b"Content-Length: 5", b"Content-Type: text/plain", b"Content-Encoding: br", b"Authorization: Bearer x",
    b"Expect: x", b"Connection: close", b"Upgrade: h2c", b"X:" + b"y" * 9000, b"X: a\r\n b\r\n c", b"\xff: \xff",
    b": x", b"x",
)  # fmt: skip


@dataclass
class Tally:
    """The outcome of all that was sent: statuses by kind, 0 for none, and what must not be."""

    ended: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Client:
    """A client that sends what it likes."""

    host: str
    port: int
    draw: random.Random

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.close() if self.draw.random() < 0.7 else writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def head(self, size: int | None, path: str = PATHS[0], *more: bytes) -> bytes:
        lines = [f"POST {path} HTTP/1.1".encode(), b"Host: localhost", b"Content-Type: application/json", *more]
        if size is not None:
            lines.append(b"Content-Length: %d" % size)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    async def send(self, data: bytes) -> int:
        """Send all and read the answer; its status."""
        async with self.connected() as (reader, writer):
            writer.write(data)
            return await answered(reader)

    def body(self) -> dict[str, Any]:
        """A proper one, of many kinds."""
        draw = self.draw
        said = [{"role": "user", "content": draw.choice(TEXTS[4:5] + TEXTS[1:3] + TEXTS[5:])}]
        body: dict[str, Any] = {"model": NAME, "messages": said, "max_tokens": draw.choice((1, 5, 40))}
        for name, values in {
            "stream": (True,), "n": (2, 8), "logprobs": (True,), "temperature": (0, 1.5), "top_p": (0.5,),
            "stop": ("a", ["b" * 500] * 20), "logit_bias": ({"5": 1},), "repetition_penalty": (1.3,), "seed": (1,),
        }.items():  # fmt: skip
            if draw.random() < 0.3:
                body[name] = draw.choice(values)
        return body

    def mutated(self, value: Any, depth: int = 0) -> Any:
        """Something like `value`, here and there something else."""
        draw = self.draw
        if draw.random() < 0.08:
            return draw.choice(
                (None, True, {}, [], [[]] * 50, {"x": {"y": 1}}, draw.choice(TEXTS), draw.choice(NUMBERS))
            )
        if isinstance(value, dict):
            found = {key: self.mutated(inner, depth + 1) for key, inner in value.items() if draw.random() > 0.03}
            if draw.random() < 0.1:
                found[draw.choice((*TEXTS, "tools", "response_format", "role", "tool_calls", "$ref"))] = value
            return found
        if isinstance(value, list):
            return [self.mutated(inner, depth + 1) for inner in value] * draw.choice((1, 1, 1, 0, 2, 300))
        return value

    # --- what they do -------------------------------------------------------------------------

    async def proper(self) -> int:
        body = json.dumps(self.body() | {"messages": [{"role": "user", "content": "Hi"}]}).encode()
        return await self.send(self.head(len(body)) + body)

    async def bodies(self) -> int:
        body = json.dumps(self.mutated(self.body())).encode()
        for _ in range(self.draw.choice((0, 0, 1, 5))):
            at = self.draw.randrange(len(body) + 1)
            body = body[:at] + self.draw.choice((b"", b'"', b"\\", b"{", b"\xff", b"\x00", b"1e999")) + body[at + 1 :]
        return await self.send(self.head(len(body), self.draw.choice(PATHS[:2])) + body)

    async def schemas(self) -> int:
        schema = self.mutated(self.draw.choice(SCHEMAS))
        wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
        changes: dict[str, Any] = {"response_format": wanted}
        if self.draw.random() < 0.5:
            tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
            changes = {"tools": [tool], "tool_choice": self.draw.choice(("auto", "required"))}
        body = json.dumps(self.body() | changes | {"max_tokens": 20}).encode()
        return await self.send(self.head(len(body)) + body)

    async def headers(self) -> int:
        draw = self.draw
        lines = draw.choices(HEADERS, k=draw.choice((1, 2, 5, 200)))
        proper = b"GET " + draw.choice(PATHS).encode() + b" HTTP/1.1"
        line = draw.choice((proper, proper, b"GET / HTTP/1.0", b"POST * HTTP/9", b"", b"GET http://x/ HTTP/1.1"))
        return await self.send(b"\r\n".join([line, b"Host: localhost", *lines]) + b"\r\n\r\n{}")

    async def large(self) -> int:
        draw, size = self.draw, self.draw.choice((100_000, 1_000_000, 8_000_000))
        unit = draw.choice((b"[],", b'{"a":{}},', b"0.1,", b'"",', b'"\\"', b"[", b'{"a":', b"null,", b" ", b"9"))
        filled = unit * (size // len(unit))
        text = draw.choice(("word ", "é", "\u4e00", "😀", " ", "a", "\n", "</s>")) * (size // 8)
        body = draw.choice((
            b"[" + filled + b"0]",
            b'{"model":"%s","messages":[' % NAME.encode() + filled + b"0]}",
            b'{"model":"%s","messages":[{"role":"user","content":[' % NAME.encode() + filled + b"0]}]}",
            b'{"model":"%s","messages":[{"role":"user","content":"' % NAME.encode() + filled + b'"}]}',
            json.dumps({"model": NAME, "messages": [{"role": "user", "content": text[:1_000_000]}], "n": 8}).encode(),
            json.dumps({"model": NAME, "prompt": [5] * min(1_000_000, size // 8)}).encode(),
            b'{"model":"%s"' % NAME.encode() + b"".join(b',"x%d":0' % i for i in range(size // 12)) + b"}",
        ))[: 8 << 20]  # fmt: skip
        return await self.send(self.head(len(body), draw.choice(PATHS[:2])) + body)

    async def chunks(self) -> int:
        size = self.draw.choice((1, 1, 2, 1000))
        one = b"%x\r\n" % size + b" " * size + b"\r\n"
        body = one * self.draw.choice((10, 50_000 // size, 400_000 // size)) + b"0\r\n\r\n"
        return await self.send(self.head(None, PATHS[0], b"Transfer-Encoding: chunked") + body)

    async def leaves(self) -> int:
        """Leave at any point."""
        body = json.dumps(self.body() | {"max_tokens": 2000, "logit_bias": {"2": -100}}).encode()
        data = self.head(len(body)) + body
        async with self.connected() as (reader, writer):
            writer.write(data[: self.draw.randrange(len(data))] if self.draw.random() < 0.4 else data)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.draw.uniform(0, 0.5)):
                    await reader.read(self.draw.choice((1, 100, 100_000)))
        return 0

    async def dribbles(self) -> int:
        body = json.dumps(self.body()).encode()
        data = self.head(len(body)) + body
        async with self.connected() as (_, writer):
            for at in range(0, len(data), max(1, len(data) // 40)):
                writer.write(data[at : at + max(1, len(data) // 40)])
                await asyncio.sleep(0.02)
        return 0

    async def unread(self) -> int:
        body = json.dumps(self.body() | {"stream": True, "max_tokens": 3000, "n": 4, "logprobs": True}).encode()
        async with self.connected() as (reader, writer):
            assert isinstance(writer.transport, asyncio.ReadTransport)
            writer.transport.pause_reading()
            writer.write(self.head(len(body)) + body)
            await asyncio.sleep(self.draw.uniform(0.2, 2))
            del reader
        return 0

    async def half(self) -> int:
        body = json.dumps(self.body()).encode()
        async with self.connected() as (reader, writer):
            writer.write(self.head(len(body)) + body)
            writer.write_eof()
            return await answered(reader) if self.draw.random() < 0.7 else 0

    async def crowd(self) -> int:
        """Open connections that say nothing, or not enough."""
        async with contextlib.AsyncExitStack() as opened:
            for _ in range(self.draw.choice((20, 100))):
                with contextlib.suppress(OSError):
                    _, writer = await opened.enter_async_context(self.connected())
                    writer.write(self.draw.choice((b"", b"GET / HT", self.head(1_000_000) + b" " * 100_000)))
            await asyncio.sleep(self.draw.uniform(0, 0.5))
        return 0


async def answered(reader: asyncio.StreamReader) -> int:
    """The status of an answer that has been read to its end; 0 if it does not come."""
    while True:
        line = await reader.readline()
        if not line.startswith(b"HTTP/1.1 "):
            return 0
        status, size, chunked = int(line.split()[1]), 0, False
        while (header := (await reader.readline()).strip().lower()) != b"":
            name, _, value = header.partition(b":")
            size = int(value) if name == b"content-length" else size
            chunked = chunked or (name == b"transfer-encoding" and b"chunked" in value)
        if status != 100:
            break
    try:
        while chunked and (size := int((await reader.readline()) or b"0", 16)):
            await reader.readexactly(size + 2)
        await reader.readexactly(size)
    except asyncio.IncompleteReadError:
        return 0
    return status


KINDS: tuple[Callable[[Client], Awaitable[int]], ...] = (
    Client.bodies, Client.schemas, Client.headers, Client.large, Client.chunks, Client.leaves, Client.dribbles,
    Client.unread, Client.half, Client.crowd, Client.proper,
)  # fmt: skip
