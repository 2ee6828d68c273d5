"""The chat in a browser: for this machine and for its own pages only."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from processes import running

CHAT = str(Path(sys.executable).parent / "m7mlx-chat")


@pytest.fixture(scope="module")
def port(model_folder: Path) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    command = [CHAT, "--web", "--port", str(number), "--model", str(model_folder), "--no-save"]
    with running(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not answers(number):
            assert time.monotonic() < until
            time.sleep(0.1)
        yield number
        process.send_signal(signal.SIGINT)
        process.wait(30)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers=headers)
    with closing(connection), connection.getresponse() as response:
        # After 101 the connection is a websocket: there is nothing to read.
        return response.status, "" if response.status == 101 else response.read().decode("utf-8", "replace")


def upgrade(port: int, **headers: str) -> int:
    keys = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    headers = keys | {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="} | headers
    return get(port, "/ws?width=80&height=24", **headers)[0]


def test_its_own_page_is_answered(port: int) -> None:
    status, page = get(port, "/")
    assert status == 200
    assert "m7mlx" in page
    assert upgrade(port, Origin=f"http://127.0.0.1:{port}") == 101
    assert upgrade(port) == 101


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost.evil"])
def test_pages_of_other_sites_are_not(port: int, origin: str) -> None:
    assert upgrade(port, Origin=origin) == 403
    assert get(port, "/", Origin=origin)[0] == 403


def test_a_name_that_was_made_to_lead_here_is_not(port: int) -> None:
    assert get(port, "/", Host="evil.example")[0] == 403
    assert get(port, "/", Host=f"localhost:{port}")[0] == 200


def test_other_machines_cannot_connect(port: int) -> None:
    address = socket.gethostbyname(socket.gethostname())
    if address.startswith("127."):
        pytest.skip("this machine has no other address")
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex((address, port)) != 0


def test_a_port_that_is_taken(port: int) -> None:
    done = subprocess.run([CHAT, "--web", "--port", str(port)], capture_output=True, check=False, timeout=60)
    assert done.returncode == 1
    assert b"cannot be opened" in done.stderr
