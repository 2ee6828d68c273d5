"""What strangers may send, for minutes: m7mlx-serve goes on answering, loses nothing and keeps nothing.

    python benchmarks/fuzz.py [--model FOLDER] [--clients 8] [--minutes 3] [--seed 0] [--latency 0.1]

Without --model, the model is a small one with random weights and a window of 16. Clients send mutated
bodies, schemas and headers, bodies of megabytes, chunks of one byte. They leave in the middle,
dribble, do not read, close one half, and come in crowds. Beside them one client asks properly, and a
process of its own watches /health.

It is a failure (exit status 1) if /health takes longer than --latency, a proper request is not
answered, a 5xx other than 503 comes, memory grows, or a request or a file stays open. The bound of
latency is for a machine with two cores that has little else to do. Everything stays on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server import NAME, object_of, serving, settled, small_model, watch_memory

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
    """What has become of all that was sent: how often each status, 0 for none; and what is wrong."""

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
        """Send `data` and read the answer; its status."""
        async with self.connected() as (reader, writer):
            writer.write(data)
            return await answered(reader)

    def body(self) -> dict[str, Any]:
        """A proper body, of many kinds."""
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

    # --- what they do -----------------------------------------------------------------------------

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
        """Open many connections that say nothing, or not enough."""
        async with contextlib.AsyncExitStack() as opened:
            for _ in range(self.draw.choice((20, 100))):
                with contextlib.suppress(OSError):
                    _, writer = await opened.enter_async_context(self.connected())
                    writer.write(self.draw.choice((b"", b"GET / HT", self.head(1_000_000) + b" " * 100_000)))
            await asyncio.sleep(self.draw.uniform(0, 0.5))
        return 0


async def answered(reader: asyncio.StreamReader) -> int:
    """Read an answer to its end; its status, 0 if it does not come."""
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


async def fuzz(url: str, clients: int, seconds: float, seed: int = 0) -> Tally:
    """Let all clients send until the time is over."""
    tally, until = Tally(), time.monotonic() + seconds
    host, _, port = url.removeprefix("http://").partition(":")

    async def client(number: int) -> None:
        one = Client(host, int(port), random.Random(f"{seed} {number}"))
        while time.monotonic() < until:
            kind = Client.proper if not number else one.draw.choice(KINDS)
            status, name = 0, getattr(kind, "__name__", "")
            try:
                async with asyncio.timeout(SECONDS if number else 60):
                    status = await kind(one)
            except (OSError, TimeoutError):
                status = 0
            tally.ended[name, status] += 1
            if status >= 500 and status != 503:
                tally.wrong.append(f"{name}: {status}")
            if not number and status not in (200, 429, 503):
                tally.wrong.append(f"a proper request was answered with {status or 'nothing'}")

    await asyncio.gather(*map(client, range(clients)))
    return tally


def watch(url: str) -> None:
    """Ask for /health until the standard input ends, and print how long it took.

    One connection is kept, and others are opened for one question each.
    """
    host, _, port = url.removeprefix("http://").partition(":")
    os.set_blocking(sys.stdin.fileno(), False)
    kept, times, lost = http.client.HTTPConnection(host, int(port), timeout=30), list[float](), 0
    while not _ended(sys.stdin.fileno()):
        for connection in (kept, http.client.HTTPConnection(host, int(port), timeout=30)):
            began = time.perf_counter()
            try:
                connection.request("GET", "/health")
                lost += connection.getresponse().read() != b'{"status":"ok"}'
            except (OSError, http.client.HTTPException):
                lost += 1
            times.append(time.perf_counter() - began)
            if connection is not kept:
                connection.close()
        time.sleep(0.02)
    times.sort()
    print(json.dumps({"most": times[-1], "p99": times[len(times) * 99 // 100], "asked": len(times), "lost": lost}))


def _ended(descriptor: int) -> bool:
    try:
        return not os.read(descriptor, 1)
    except BlockingIOError:
        return False


@contextlib.contextmanager
def watching(url: str, found: dict[str, float]) -> Any:
    """Put into `found` what `watch` finds meanwhile, in a process that has nothing else to do."""
    watcher = subprocess.Popen(
        [sys.executable, __file__, "--watch", url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield
    finally:
        out, _ = watcher.communicate(timeout=60)
        found |= json.loads(out)


def open_files(process: int) -> int:
    """The open files of a process; 0 where the system does not tell."""
    folder = Path(f"/proc/{process}/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


async def _run(url: str, process: int, args: argparse.Namespace) -> list[str]:
    """Run all of it; what is wrong."""
    await fuzz(url, args.clients, args.minutes * 6, args.seed + 1)  # until memory is what it is
    await settled(url)
    files, sizes, health = open_files(process), list[float](), dict[str, float]()
    sizing = asyncio.create_task(watch_memory(process, sizes))
    with watching(url, health):
        tally = await fuzz(url, args.clients, args.minutes * 60, args.seed)
    sizing.cancel()
    left = await settled(url)
    await asyncio.sleep(2)
    third = max(1, len(sizes) // 3)
    first, last = statistics.median(sizes[:third]), statistics.median(sizes[-third:])
    by_kind: dict[str, dict[int, int]] = {}
    for (kind, status), count in sorted(tally.ended.items()):
        by_kind.setdefault(kind, {})[status] = count
    for kind, statuses in by_kind.items():
        print(f"{kind:10}", ", ".join(f"{status or 'none'} × {count}" for status, count in statuses.items()))
    print(f"/health, ms: p99 {health['p99'] * 1e3:.0f}, most {health['most'] * 1e3:.0f}, of {health['asked']:.0f}")
    print(f"resident memory, MB: first third {first:.0f}, last third {last:.0f}, most {max(sizes):.0f}")
    print(f"open at the end: {left:g} requests, {open_files(process)} files, {files} before")
    wrong = tally.wrong[:10]
    if health["most"] > args.latency:
        wrong.append(f"/health took {health['most'] * 1e3:.0f} ms")
    if health["lost"]:
        wrong.append(f"/health was not answered {health['lost']:.0f} times")
    if last > first * 1.2 + 50:
        wrong.append("memory grows")
    if left or open_files(process) > files + 8:
        wrong.append("something stays open")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="MODEL")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.1, metavar="S", help="the longest time for /health")
    parser.add_argument("--watch", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watch:
        watch(args.watch)
        return
    from m7mlx.files.hub import resolve

    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve(args.model) if args.model else small_model(Path(scratch))
        with serving(folder) as (url, process):
            wrong = asyncio.run(_run(url, process, args))
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
