"""Connections by raw sockets: no proper HTTP, dribbling, never reading, one too many."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from m7mlx_serve import bodies, connection
from m7mlx_serve.admission import Admission
from m7mlx_serve.listener import Listener, most_connections
from serving import CHAT, ENDLESS, serving, settle

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


def host(name: bytes) -> bytes:
    return get(b"/health", b"Host: " + name + b"\r\n")


RAW: dict[str, tuple[bytes, int]] = {
    **{
        f"host {name.decode()}": (host(name), 200)
        for name in (b"localhost", b"LOCALHOST:80", b"127.0.0.1:65535", b"[::1]", b"[::1]:8080")
    },
    **{
        f"host {name.decode('latin-1')}": (host(name), 403)
        for name in (
            b"[::1]evil.example",
            b"[::1]:80evil.example",
            b"[::1",
            b"::1",
            b"localhost:abc",
            b"localhost:80:80",
            b"localhost:99999",
            b"localhost:-1",
            b"localhost:",
            b":80",
            b"",
            b"evil@localhost",
            b"localhost@evil",
            b"localhost.",
            b"localhost.evil.example",
            b"localhost/",
            b"localhost?",
            b"local\xdfhost",
            b"[localhost]",
            b"localhost, evil.example",
            b"127.0.0.1.",
            b"127.1",
            b"2130706433",
            b"localhost\t:80",
            b"localhost:\xb2",
        )
    },
    "an origin of another kind": (get(b"/health", HOST + b"Origin: evil://localhost\r\n"), 403),
    "its own origin": (get(b"/health", HOST + b"Origin: http://localhost\r\n"), 200),
    "many short headers": (get(b"/health", HOST + b"x:\r\n" * 5000), 431),
    "a header of many lines": (get(b"/health", HOST + b"x: y\r\n" + b" z\r\n" * 3000), 431),
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
def listening(app: Any = None, connections: int | None = None) -> Iterator[tuple[int, Listener]]:
    """A listener in this process, of an app that has no model."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        server = Listener(app or Admission(_app, ["/"], {"localhost"}, ()), lambda: None, connections)
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
    monkeypatch.setattr(connection, "HEADER_SECONDS", 2.0)
    monkeypatch.setattr(connection, "WRITE_SECONDS", 2.0)
    monkeypatch.setattr(bodies, "BODY_SECONDS", 2.0)
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


def test_large_bodies_find_room_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is slow gives way to who waits; small ones need no room."""
    monkeypatch.setattr(bodies, "MAX_BODIES", 1 << 20)
    monkeypatch.setattr(bodies, "ARRIVAL_SECONDS", 0.5)
    monkeypatch.setattr(bodies, "ROOM_SECONDS", 3.0)
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    with listening() as (port, _), ExitStack() as opened:

        def send(size: int, of: int) -> socket.socket:
            raw = opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            raw.sendall(head + b"%d\r\n\r\n" % of + b" " * size)
            return raw

        slow = [send(300_000, 400_000) for _ in range(3)]  # two come, one waits
        assert answered(send(50_000, 50_000))[0] == 200  # at once, though nobody has given way yet
        fast = [send(400_000, 400_000) for _ in range(8)]
        assert [answered(raw)[0] for raw in fast] == [200] * 8
        assert [answered(raw)[0] for raw in slow[:2]] == [503, 503]
        slow[2].sendall(b" " * 100_000)
        assert answered(slow[2])[0] == 200  # there was room for it in the end


def test_one_connection_too_many() -> None:
    with listening(connections=5) as (port, server):
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
    assert most_connections() >= 16


def test_small_answers_are_sent_at_once() -> None:
    with listening() as (port, server), socket.create_connection(("127.0.0.1", port)):
        wait_for(lambda: server.server_state.connections)
        (accepting,) = server.server_state.connections
        accepted = accepting.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def ask(**changes: Any) -> bytes:
    """A POST in bytes."""
    body = json.dumps(CHAT | changes).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def rest(raw: socket.socket) -> bytes:
    said = b""
    while more := raw.recv(1 << 16):
        said += more
    return said


def test_who_has_closed_one_half_is_answered(port: int) -> None:
    for data, answers in (
        (ask(max_tokens=300, logit_bias={"2": -100}), 1),
        (ask(max_tokens=5) + ask(max_tokens=5) + get(b"/health"), 3),
        (ask(max_tokens=300, stream=True), 1),
        (get(b"/health"), 1),
        (get(b"/health", HOST, b"HTTP/1.0"), 1),
        (ask(max_tokens=300, logit_bias={"2": -100}).replace(b"HTTP/1.1", b"HTTP/1.0"), 1),
        (ask(max_tokens=300, stream=True).replace(b"HTTP/1.1", b"HTTP/1.0"), 1),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            said = rest(raw)  # and then it is closed
        assert said.count(b"HTTP/1.1 200 OK") == answers
        assert b"data: [DONE]" in said if b'"stream": true' in data else said.endswith(b"}")
    for data in (ask()[:-1], CHUNKED + b"\r\n5\r\n{", b"GET /heal", b""):  # nothing that could be answered
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            assert rest(raw) == b""


@pytest.mark.parametrize("stream", [False, True])
def test_who_has_closed_one_half_and_leaves_is_noticed(port: int, stream: bool) -> None:
    url = f"http://127.0.0.1:{port}"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(ask(**ENDLESS | {"stream": stream}))
        raw.shutdown(socket.SHUT_WR)
        settle(url, 1)
    settle(url, 0)


def test_a_client_of_http_1_0_is_not_answered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has closed one half may have gone, and nothing can be sent to find out."""
    monkeypatch.setattr(connection, "UNSURE_SECONDS", 0.2)
    gone = threading.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        if scope["type"] == "http":
            assert (await receive())["type"] == "http.request"
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

    with listening(waits) as (port, _), socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(get(b"/", HOST, b"HTTP/1.0"))
        raw.shutdown(socket.SHUT_WR)
        assert gone.wait(20)


def test_chunks_of_one_byte_hold_nobody_up() -> None:
    """Parsing one read of them takes a second; of eight in one go it would be eight."""
    chunked = (
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    )
    with listening() as (port, _), ExitStack() as opened:
        senders = []
        for _ in range(8):
            raw = opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            raw.sendall(chunked + b"\r\n")
            data = b"1\r\n{\r\n" * 20_000 + b"0\r\n\r\n"
            senders.append(threading.Thread(target=raw.sendall, args=(data,)))
        for sender in senders:
            sender.start()
        worst = 0.0
        for _ in range(20):
            began = time.perf_counter()
            with socket.create_connection(("127.0.0.1", port), timeout=60) as other:
                other.sendall(
                    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n"
                )
                assert answered(other)[0] == 415
            worst = max(worst, time.perf_counter() - began)
        for sender in senders:
            sender.join()
    assert worst < 3  # a busy machine takes longer for everything


def test_more_connections_than_file_numbers(model_folder: Path) -> None:
    """Connections beyond are refused without a line on stderr, and others are served later on."""
    with serving(model_folder, files=128) as (url, process), ExitStack() as opened:
        port = int(url.rpartition(":")[2])
        for _ in range(2):
            with ExitStack() as many:
                for _ in range(200):
                    raw = many.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
                    raw.setblocking(False)
                time.sleep(1)
            wait_for(lambda: httpx.get(f"{url}/health", timeout=5).status_code == 200)
        opened.callback(process.kill)
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=20).status_code == 200
        process.terminate()
        assert process.stderr is not None and process.stderr.read() == ""
        assert process.wait(30) == 0
