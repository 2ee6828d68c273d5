"""The chat in a browser: only for whoever has its secret, and no longer than its page."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, CookieJar, TCPConnector, WSMsgType, WSServerHandshakeError
from browser import Page, browsing

CHAT = str(Path(sys.executable).parent / "m7mlx-chat")


@dataclass
class Server:
    """A running m7mlx-chat --web."""

    process: subprocess.Popen[str]
    port: int
    address: str  # with the secret
    model: Path

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def client(self, *, visited: bool = True) -> AsyncIterator[ClientSession]:
        """A browser that has (or has not) been at the address that was printed."""
        async with ClientSession(
            self.origin, cookie_jar=CookieJar(unsafe=True), connector=TCPConnector(limit=0)
        ) as session:
            if visited:
                async with session.get(self.address) as page:
                    assert page.status == 200
            yield session

    def chats(self) -> list[int]:
        """The processes of its pages, whoever their parent is by now."""
        listed = subprocess.run(
            ["ps", "-axww", "-o", "pid=,stat=,command="], capture_output=True, text=True, check=True
        )
        lines = (line.split(maxsplit=2) for line in listed.stdout.splitlines())
        return [
            int(line[0])
            for line in lines
            if not line[1].startswith("Z") and f"--interactive --port {self.port} " in line[2]
        ]

    async def wait_for_chats(self, count: int, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while len(self.chats()) != count:
            assert time.monotonic() < until, (self.chats(), count)
            await asyncio.sleep(0.2)


def start(model: Path, *options: str) -> Server:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [CHAT, "--web", "--port", str(port), "--model", str(model), "--no-save", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    said = process.stderr.readline()
    found = re.search(rf"http://127\.0\.0\.1:{port}/\S+", said)
    assert found, said + process.stderr.read()
    return Server(process, port, found[0], model)


@pytest.fixture
def starting(model_folder: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def begin(*options: str) -> Server:
        started.append(start(model_folder, *options))
        return started[-1]

    yield begin
    for server in started:
        server.process.kill()
        server.process.wait()
        assert server.process.stderr is not None
        server.process.stderr.close()
        for pid in server.chats():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Server]:
    server = start(model_folder)
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert server.process.stderr is not None
    assert server.process.stderr.read() == ""  # whatever was tried
    server.process.stderr.close()
    assert server.chats() == []


def websocket(session: ClientSession, **headers: str) -> asyncio.Future[ClientWebSocketResponse]:
    return session.ws_connect("/ws?width=100&height=30", headers=headers)  # type: ignore[return-value]


async def shown(page: ClientWebSocketResponse, word: str) -> str:
    """What the chat has drawn once it has drawn `word`."""
    seen = b""
    while word not in seen.decode("utf-8", "replace"):
        message = await page.receive(timeout=60)
        assert message.type in (WSMsgType.BINARY, WSMsgType.TEXT), (message, seen[-500:])
        seen += message.data if message.type is WSMsgType.BINARY else b""
    return seen.decode("utf-8", "replace")


async def end_of(page: ClientWebSocketResponse) -> WSMsgType:
    """How it ends, after all that the chat has drawn and told."""
    while (got := await page.receive(timeout=60)).type in (WSMsgType.BINARY, WSMsgType.TEXT):
        pass
    return got.type


# --- who may come in ------------------------------------------------------------------------------

PATHS = ["/", "/?key=wrong", "/?key=%ff%00é", "/ws", "/static/js/textual.js", "/static/", "/download/x", "/nowhere"]


@pytest.mark.parametrize("path", PATHS)
async def test_without_the_secret_there_is_nothing(server: Server, path: str) -> None:
    async with server.client(visited=False) as session:
        for cookies in ({}, {f"m7mlx-{server.port}": "wrong"}, {f"m7mlx-{server.port}": ""}):
            async with session.get(path, cookies=cookies, allow_redirects=False) as answer:
                assert answer.status == 401
                assert "textual" not in await answer.text()
                assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


async def test_a_socket_without_the_secret_is_no_chat(server: Server) -> None:
    async with server.client(visited=False) as session:
        for headers in ({}, {"Origin": server.origin}, {"Cookie": f"m7mlx-{server.port}=x"}):
            with pytest.raises(WSServerHandshakeError, match="401"):
                await websocket(session, **headers)
    assert server.chats() == []


async def test_the_secret_becomes_a_cookie_and_leaves_the_address(server: Server) -> None:
    async with server.client(visited=False) as session:
        async with session.get(server.address, allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (303, "/")
            cookie = answer.headers["Set-Cookie"]
            assert all(part in cookie for part in ("HttpOnly", "SameSite=Strict", "Path=/"))
            assert answer.headers["Referrer-Policy"] == "no-referrer"
        async with session.get("/") as answer:
            page = await answer.text()
            assert answer.status == 200
            assert server.address.split("=")[1] not in page
            assert re.findall(r"(?:src|href)=\"([^\"]*)", page) == [
                *("data:,", "/static/css/xterm.css", "/static/js/textual.js", "/")
            ]  # nothing from elsewhere
            assert page.count("<script") == 2 and "onclick" not in page.lower()
            headers = answer.headers
            scripts = re.findall("script-src ([^;]*)", headers["Content-Security-Policy"])
            assert re.fullmatch("'self' 'sha256-[A-Za-z0-9+/=]{44}'", scripts[0])
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cache-Control"] == "no-store"
        async with session.get("/static/js/textual.js") as answer:
            assert answer.status == 200
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        for path, status in (("/static/", 403), ("/download/x", 404), ("/nowhere", 404), ("/static/../web.py", 404)):
            async with session.get(path) as answer:
                assert answer.status == status, path
        async with session.post("/", data="x" * 100) as answer:
            assert answer.status == 405


HOSTS = ["evil.example", "[::1]evil.example:PORT", "127.0.0.1", "127.0.0.1:1", "localhost.evil:PORT", "0.0.0.0:PORT"]
HOSTS += ["", "127.0.0.1:PORT.evil", "user@127.0.0.1:PORT", "[::1]:PORT", "127.0.0.1:PORT,evil"]
ORIGINS = ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:PORT", "http://localhost:PORT", ""]


@pytest.mark.parametrize("host", HOSTS)
async def test_a_name_that_was_made_to_lead_here_is_refused(server: Server, host: str) -> None:
    async with server.client() as session:
        headers = {"Host": host.replace("PORT", str(server.port))}
        for path in ("/", "/static/js/textual.js", server.address):
            async with session.get(path, headers=headers) as answer:
                assert answer.status in (400, 403)
        with pytest.raises(WSServerHandshakeError, match=r"40[03]"):
            await websocket(session, **headers)


@pytest.mark.parametrize("origin", ORIGINS)
async def test_pages_of_other_sites_are_refused(server: Server, origin: str) -> None:
    async with server.client() as session:
        headers = {"Origin": origin.replace("PORT", str(server.port))}
        async with session.get("/", headers=headers) as answer:
            assert answer.status == 403
        with pytest.raises(WSServerHandshakeError, match="403"):
            await websocket(session, **headers)
    assert server.chats() == []


async def test_localhost_is_a_name_of_it(server: Server) -> None:
    async with server.client(visited=False) as session:
        address = server.address.replace("127.0.0.1", "localhost")
        async with session.get(address, headers={"Host": f"LocalHost:{server.port}"}) as answer:
            assert answer.status in (200, 401)  # the cookie is for the name of the first visit
        headers = {"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}
        headers["Cookie"] = f"m7mlx-{server.port}={server.address.split('=')[1]}"
        async with session.get("/", headers=headers) as answer:
            assert answer.status == 200
            assert f"ws://localhost:{server.port}/ws" in await answer.text()


def test_other_machines_cannot_connect(server: Server) -> None:
    address = socket.gethostbyname(socket.gethostname())
    if address.startswith("127."):
        pytest.skip("this machine has no other address")
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex((address, server.port)) != 0


def test_a_taken_port_is_told_in_one_line(server: Server) -> None:
    done = subprocess.run(
        [CHAT, "--web", "--port", str(server.port)], capture_output=True, check=False, timeout=60, text=True
    )
    assert done.returncode == 1
    assert re.fullmatch(r"m7mlx-chat: error: port \d+ cannot be opened \(.*\n", done.stderr)


# --- the chat in it -------------------------------------------------------------------------------


async def test_a_page_is_a_chat_and_the_chat_ends_with_it(server: Server) -> None:
    async with server.client() as session:
        page = await websocket(session, Origin=server.origin)
        await shown(page, "Write a message")
        await page.send_json(["resize", {"width": 10**9, "height": 10**9}])
        await page.send_json(["ping", "1"])
        await page.send_json(["stdin", "typed"])
        await shown(page, "typed")
        assert len(server.chats()) == 1
        await page.close()
    await server.wait_for_chats(0)


async def test_one_model_answers_all_pages(starting: Callable[..., Server]) -> None:
    """Two questions at once are both answered; the model is in the server's process alone."""
    server = starting("--max-tokens", "20")
    async with server.client() as session:
        pages = [await websocket(session) for _ in range(3)]
        for page in pages:
            await shown(page, "ready")
        for page in pages[:2]:
            await page.send_json(["stdin", "Tell me\r"])
        for page in pages[:2]:
            await shown(page, "20 tokens")
        if sys.platform == "linux":
            weights = str(server.model / "model.safetensors")
            assert weights in Path(f"/proc/{server.process.pid}/maps").read_text()
            assert not any(weights in Path(f"/proc/{pid}/maps").read_text() for pid in server.chats())
        for page in pages:
            await page.close()
        await server.wait_for_chats(0)


@pytest.mark.parametrize("seconds", [0, 0.05, 0.3, 1, 2])
async def test_a_page_closed_at_once_leaves_nothing(server: Server, seconds: float) -> None:
    async with server.client() as session:
        page = await websocket(session)
        await asyncio.sleep(seconds)
        assert page._response.connection is not None and page._response.connection.transport is not None
        page._response.connection.transport.abort()  # without a word
        await page.close()
    await server.wait_for_chats(0)


@pytest.mark.parametrize(
    "message", ["{", "[]", '["stdin", 1]', '["resize", {}]', "[" * 100_000, '["open", "x"]', "7"]
)
async def test_what_no_page_says_ends_the_chat_quietly(server: Server, message: str) -> None:
    async with server.client() as session:
        page = await websocket(session)
        await page.send_str(message)
        assert await end_of(page) in (WSMsgType.CLOSE, WSMsgType.CLOSED)
    await server.wait_for_chats(0)


async def test_a_message_too_long_ends_the_chat(server: Server) -> None:
    async with server.client() as session:
        page = await websocket(session)
        with contextlib.suppress(ConnectionError):  # it is refused before it is there
            await page.send_str('["stdin", "' + "a" * (5 << 20) + '"]')
        assert await end_of(page) in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR)
    await server.wait_for_chats(0)


async def test_chats_are_bounded_and_a_page_says_so(server: Server) -> None:
    async with server.client() as session:
        pages = [await websocket(session) for _ in range(4)]
        with pytest.raises(WSServerHandshakeError, match="503"):
            await websocket(session)
        async with session.get("/") as answer:
            assert answer.status == 503
            assert "4 chats are open" in await answer.text()
        assert len(server.chats()) == 4
        for page in pages:
            await page.close()
        await server.wait_for_chats(0)
        async with session.get("/") as answer:
            assert answer.status == 200


async def test_strangers_connections_do_not_keep_its_user_out(server: Server) -> None:
    held = []
    try:
        for _ in range(150):
            one = socket.create_connection(("127.0.0.1", server.port))
            one.sendall(b"GET / HTTP/1.1\r\n")  # and no more
            held.append(one)
        async with server.client() as session, session.get("/") as answer:
            assert answer.status == 200
        ended = 0
        for one in held[:100]:
            one.settimeout(30)
            try:
                ended += one.recv(100) == b""
            except ConnectionResetError:  # closed with what it had sent unread
                ended += 1
        assert ended >= 80
    finally:
        for one in held:
            one.close()


async def test_a_chat_that_cannot_start_says_why_on_the_page(starting: Callable[..., Server], tmp_path: Path) -> None:
    server = starting()
    async with server.client() as session:
        moved = shutil.move(server.model, tmp_path / "moved")
        try:
            page = await websocket(session)
            assert "m7mlx-chat: error:" in await shown(page, "is no folder here")
            assert (await page.receive(timeout=30)).type is WSMsgType.CLOSE
        finally:
            shutil.move(moved, server.model)


async def enter(page: Page, text: str) -> None:
    """Type a line, and send it once it is drawn."""
    for key in text:
        await page.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        await page.call("Input.dispatchKeyEvent", type="keyUp", key=key)
    await asyncio.sleep(1)
    for kind in ("keyDown", "keyUp"):
        code = {"code": "Enter", "key": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        await page.call("Input.dispatchKeyEvent", type=kind, **code)


@pytest.mark.chromium
async def test_a_real_browser_shows_the_chat_and_types(server: Server, tmp_path: Path) -> None:
    async with browsing(tmp_path) as page:
        await page.call("Page.navigate", url=server.address)
        await page.until("document.body && document.body.classList.contains('-first-byte')")
        assert await page.value("location.href") == f"{server.origin}/"
        await asyncio.sleep(3)
        loaded = await page.value("performance.getEntriesByType('resource').map((one) => one.name)")
        assert all(name.startswith(f"{server.origin}/") for name in loaded)
        assert await page.value("document.title") == "m7mlx"
        errors = [one for one in page.complaints if one.get("entry", {"level": "error"})["level"] == "error"]
        assert not errors  # of the content security policy, say
        async with server.client() as session:
            other = await websocket(session)  # the same answer to its socket as to ours
            await shown(other, "Write a message")
            assert len(server.chats()) == 2
            await other.close()
        await server.wait_for_chats(1)
        await enter(page, "About apples")
        await page.until("document.title.endsWith('About apples · m7mlx')")
        await enter(page, "/bye")
        await page.until("document.body.classList.contains('-closed')")
        assert await page.value("getComputedStyle(document.getElementById('ended')).display") == "block"
    await server.wait_for_chats(0)


# --- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("when", ["at once", "in the chat"])
async def test_chats_end_with_the_server(starting: Callable[..., Server], number: signal.Signals, when: str) -> None:
    server = starting()
    async with server.client() as session:
        pages = [await websocket(session) for _ in range(2)]
        if when == "in the chat":
            for page in pages:
                await shown(page, "Write a message")
        await server.wait_for_chats(2)
        server.process.send_signal(number)
        status = await asyncio.to_thread(server.process.wait, 30)
        assert status == (-signal.SIGKILL if number is signal.SIGKILL else 0)
        await server.wait_for_chats(0, seconds=30)
    assert server.process.stderr is not None
    assert server.process.stderr.read() == ""
