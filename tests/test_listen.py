"""Connections by raw sockets: what is no proper HTTP, what dribbles, what never reads, one too many."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from m7mlx_server import guard, listen
from test_server import serving

HOST = b"Host: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"


@pytest.fixture(scope="module")
def port(model_folder: Path) -> Iterator[int]:
    with serving(model_folder) as (url, _):
        yield int(url.rpartition(":")[2])


def answered(raw: socket.socket) -> tuple[int, bytes]:
    """Status and body of one answer; 0 if the connection ends without one."""
    said = b""
    while True:
        head, ended, body = re.sub(rb"^HTTP/1.1 100.*\r\n\r\n", b"", said).partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if ended and length and len(body) >= int(length[1]):
            return int(head.split()[1]), body
        if not (more := raw.recv(1 << 16)):
            return 0, said
        said += more


def get(path: bytes, headers: bytes = HOST, version: bytes = b"HTTP/1.1") -> bytes:
    return b"GET " + path + b" " + version + b"\r\n" + headers + b"\r\n"


RAW: dict[str, tuple[bytes, int]] = {
    "two hosts": (get(b"/health", HOST + b"Host: evil.example\r\n"), 400),
    "no host": (get(b"/health", b""), 400),
    "1.0 without a host": (get(b"/health", b"", b"HTTP/1.0"), 403),
    "1.0": (get(b"/health", HOST, b"HTTP/1.0"), 200),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", 400),
    "a length of 25 digits": (POST + b"Content-Length: " + b"9" * 25 + b"\r\n\r\n{}", 400),
    "length and chunks": (CHUNKED + b"Content-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400),
    "an encoding": (POST + b"Transfer-Encoding: gzip\r\n\r\n{}", 400),
    "chunks that are none": (CHUNKED + b"\r\nzz\r\n{}\r\n0\r\n\r\n", 400),
    "chunks over the bound": (
        CHUNKED + b"\r\n" + (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 9 + b"0\r\n\r\n",
        413,
    ),
    "another's address": (get(b"http://evil.example/health"), 400),
    "a star": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a tunnel": (b"CONNECT evil.example:443 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no UTF-8": (get(b"/v1/models/%ff%fe"), 404),
    "half a character": (get(b"/v1/models/%ed%a0%80"), 404),
    "bytes in a path": (get(b"/v1/models/\xff"), 400),
    "a NUL": (get(b"/v1/models/%00"), 404),
    "up and up": (get(b"/v1/../../../etc/passwd"), 404),
    "many headers": (get(b"/health", HOST + b"".join(b"X-%d: y\r\n" % i for i in range(200))), 431),
    "a large header": (get(b"/health", HOST + b"X: " + b"y" * 30_000 + b"\r\n"), 431),
    "a huge header": (get(b"/health", HOST + b"X: " + b"y" * 100_000), 431),
    "TLS": (b"\x16\x03\x01\x02\x00\x01hello\r\n\r\n", 400),
    "a WebSocket": (get(b"/health", HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"), 200),
    "may I": (POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}", 400),
    "a method": (b"POST /health HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n", 405),
    "a key that is none": (get(b"/health", HOST + b"Authorization: Bearer \xff\xfe\r\n"), 200),
    "an origin that is none": (get(b"/health", HOST + b"Origin: http://[bad\r\n"), 403),
    "two origins": (get(b"/health", HOST + b"Origin: http://localhost\r\nOrigin: http://evil.example\r\n"), 400),
    "two types": (POST + b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}", 400),
}


@pytest.mark.parametrize("name", list(RAW))
def test_what_is_no_proper_request(port: int, name: str) -> None:
    data, status = RAW[name]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(data)
        found, body = answered(raw)
    assert found == status
    assert status == 200 or re.match(rb'{"error": ?{"message": ?"', body)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    """Answers a POST once its body is there, and a GET with more than anybody reads."""
    if scope["type"] == "lifespan":
        return
    size = 2 if scope["method"] == "POST" else 64 << 20
    while scope["method"] == "POST" and (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    await send({"type": "http.response.body", "body": b"x" * size})


@contextmanager
def listening() -> Iterator[tuple[int, listen.Listener]]:
    """A listener in this process, of an app that has no model."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        app = guard.Guard(_app, ["/"], {"localhost"}, None)
        server = listen.Listener(app, lambda: None)
        thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[bound]),))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield port, server
        finally:
            server.should_exit = True
            thread.join()


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_who_dribbles_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "HEADER_SECONDS", 2.0)
    monkeypatch.setattr(listen, "WRITE_SECONDS", 2.0)
    monkeypatch.setattr(guard, "BODY_SECONDS", 2.0)
    with listening() as (port, server), ExitStack() as opened:

        def connect(data: bytes) -> socket.socket:
            raw = opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            raw.sendall(data)
            return raw

        body = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        silent, begun, waiting = connect(b""), connect(b"GET / HT"), connect(body + b"9\r\n\r\n{")
        again, early = connect(body + b"2\r\n\r\n{}"), connect(body.replace(b"json", b"text") + b"99\r\n\r\n{")
        unread = connect(get(b"/"))
        assert answered(again)[0] == 200
        again.sendall(b"GET")  # and nothing more, long before an idle connection is closed
        assert answered(early)[0] == 415
        early.sendall(b" ")
        assert [answered(raw)[0] for raw in (silent, begun, waiting, again, early)] == [0, 408, 408, 408, 0]
        unread.recv(1)
        wait_for(lambda: not server.server_state.tasks)  # what nobody reads is given up
        wait_for(lambda: len(server.server_state.connections) <= 1)  # `waiting` may ask something else


def test_one_connection_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen.Connection, "_most", 5)
    with listening() as (port, server):
        with ExitStack() as idle:
            for _ in range(5):
                idle.enter_context(socket.create_connection(("127.0.0.1", port)))
            wait_for(lambda: len(server.server_state.connections) == 5)
            with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
                assert answered(raw)[0] == 503
        wait_for(lambda: not server.server_state.connections)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert raw.recv(12) == b"HTTP/1.1 200"
    assert listen.most_connections() >= 16
