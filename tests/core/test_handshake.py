"""The processes of a run find each other, whoever else connects."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from processes import piped, running

from m7mlx.errors import RunError
from m7mlx.parallel import handshake, world
from m7mlx.parallel.handshake import greet, meet

KEY = b"k" * 16
Meeting = Callable[..., "Future[dict[int, socket.socket]]"]


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listening:
        yield listening


@pytest.fixture
def meeting(server: socket.socket) -> Iterator[Meeting]:
    """Begin to wait for ranks, on a thread."""
    begun: list[Future[dict[int, socket.socket]]] = []
    with ThreadPoolExecutor(1) as pool:

        def begin(size: int, seconds: float = 60) -> Future[dict[int, socket.socket]]:
            begun.append(pool.submit(meet, server, size, KEY, seconds))
            return begun[-1]

        yield begin
    for one in begun:
        if one.exception() is None:
            for found in one.result().values():
                found.close()


@pytest.fixture
def call(server: socket.socket) -> Iterator[Callable[[], socket.socket]]:
    """Connect, as anybody can."""
    with contextlib.ExitStack() as opened:
        yield lambda: opened.enter_context(socket.create_connection(server.getsockname(), timeout=30))


def closed(one: socket.socket) -> bool:
    """Whether the other side has closed the line, once it has said what it says."""
    with contextlib.suppress(ConnectionError):
        while one.recv(1000):
            pass
    return True


def test_both_sides_prove_who_they_are(meeting: Meeting, call: Callable[[], socket.socket]) -> None:
    found = meeting(4)
    lines = {rank: call() for rank in (3, 1, 2)}
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda rank: greet(lines[rank], rank, KEY), lines))
    assert set(found.result(30)) == {1, 2, 3}
    for rank, one in found.result().items():
        lines[rank].sendall(b"hello %d" % rank)
        one.settimeout(30)
        assert one.recv(100) == b"hello %d" % rank


@pytest.mark.parametrize("count", [1, 100])
def test_strangers_who_say_nothing_hold_nobody_up(
    meeting: Meeting, call: Callable[[], socket.socket], count: int
) -> None:
    found = meeting(3)
    greet(call(), 2, KEY)
    silent = [call() for _ in range(count)]
    began = time.monotonic()
    greet(call(), 1, KEY)  # last of all
    assert set(found.result(30)) == {1, 2}
    assert time.monotonic() - began < handshake._CALLER_SECONDS / 2
    assert all(closed(one) for one in silent)


def test_a_silent_stranger_is_sent_away_and_the_wait_goes_on(
    meeting: Meeting, call: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "_CALLER_SECONDS", 0.2)
    found = meeting(2)
    stranger, slow = call(), call()
    for _ in range(10):  # a letter at a time does not buy time
        with contextlib.suppress(OSError):
            slow.sendall(b"x")
        time.sleep(0.05)
    assert closed(stranger) and closed(slow)
    assert not found.done()
    greet(call(), 1, KEY)
    assert set(found.result(30)) == {1}


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 10, b"\0" * 66, secrets.token_bytes(66), b"\xff" * 10_000, b"x"],
    ids=["http", "zeros", "random", "much", "little"],
)
def test_garbage_is_sent_away(meeting: Meeting, call: Callable[[], socket.socket], said: bytes) -> None:
    found = meeting(2)
    stranger = call()
    with contextlib.suppress(OSError):
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
    assert closed(stranger)
    greet(call(), 1, KEY)
    assert set(found.result(30)) == {1}


@pytest.mark.parametrize(("rank", "key"), [(1, b"another key"), (0, KEY), (3, KEY), (65535, KEY)])
def test_the_wrong_key_or_rank_is_sent_away(
    meeting: Meeting, call: Callable[[], socket.socket], rank: int, key: bytes
) -> None:
    found = meeting(3)
    with pytest.raises(OSError, match=r"closed|reset"):
        greet(call(), rank, key)
    greet(call(), 1, KEY)
    with pytest.raises(OSError, match=r"closed|reset"):
        greet(call(), 1, KEY)  # it is here already
    greet(call(), 2, KEY)
    assert set(found.result(30)) == {1, 2}


def test_what_was_said_before_cannot_be_said_again(meeting: Meeting, call: Callable[[], socket.socket]) -> None:
    found = meeting(3)
    line = call()
    nonces = handshake._exactly(line, 32) + secrets.token_bytes(32)
    greeting = b"\0\1" + nonces[32:] + handshake._mac(KEY, b"other", 1, nonces)
    line.sendall(greeting)
    proof = handshake._exactly(line, 32)
    for said in (greeting, b"\0\2" + greeting[2:], b"\0\2" + nonces[32:] + proof):
        again = call()
        again.sendall(said)
        assert len(handshake._exactly(again, 32)) == 32 and closed(again)
    greet(call(), 2, KEY)
    assert set(found.result(30)) == {1, 2}


def test_what_the_other_side_says_proves_nothing(meeting: Meeting, call: Callable[[], socket.socket]) -> None:
    """A stranger in the middle who sends each side its own numbers and proofs back."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        ours.settimeout(30)
        greeted = pool.submit(greet, ours, 1, KEY)
        theirs.sendall(bytes(32))
        said = handshake._exactly(theirs, 66)
        theirs.sendall(said[34:])  # its own proof
        with pytest.raises(RunError, match="somebody else answers"):
            greeted.result(30)
    found = meeting(2)
    line = call()
    nonce = handshake._exactly(line, 32)
    proof = hmac.digest(KEY, b"m7mlx first\0\1" + nonce + nonce, "sha256")  # as if the first had said it
    line.sendall(b"\0\1" + nonce + proof)
    assert closed(line)
    greet(call(), 1, KEY)
    found.result(30)


def test_a_rank_that_does_not_come_is_named(meeting: Meeting, call: Callable[[], socket.socket]) -> None:
    found = meeting(3, 0.5)
    greet(call(), 1, KEY)
    silent = call()
    with pytest.raises(RunError, match="process 2 of 3 did not come within"):
        found.result(30)
    assert closed(silent)


LEAD = """
from m7mlx.parallel.channel import open_channel
line = open_channel(2, "127.0.0.1", lambda port, key: print(port, key.hex(), flush=True))
print("all are here", line.hear(), flush=True)
line.close()
"""
CONNECT = """
import sys
from m7mlx.parallel.channel import join_channel
line = join_channel(1, "127.0.0.1", int(sys.argv[1]), bytes.fromhex(sys.argv[2]))
line.tell({"said": "hello"})
line.hear()
"""


def test_a_line_between_two_processes_beside_strangers() -> None:
    with running([sys.executable, "-c", LEAD], stdout=subprocess.PIPE, text=True) as first:
        port, key = piped(first.stdout).readline().split()
        with socket.create_connection(("127.0.0.1", int(port))):
            done = subprocess.run([sys.executable, "-c", CONNECT, port, key], timeout=60, check=False)
        assert done.returncode == 0
        assert piped(first.stdout).readline() == "all are here {'said': 'hello'}\n"


def test_a_line_to_somebody_else_is_one_line() -> None:
    def impostor() -> None:
        one, _ = listening.accept()
        with one:
            one.sendall(bytes(32) + bytes(32))
            closed(one)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=impostor, daemon=True).start()
        port = str(listening.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", CONNECT, port, KEY.hex()], capture_output=True, text=True, timeout=60, check=False
        )
    assert "somebody else answers at the address of the first process" in done.stderr


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({"M7MLX_FIRST_HOST": "127.0.0.7", "MLX_JACCL_COORDINATOR": "127.0.0.1:9"}, "127.0.0.7"),
        ({"MLX_JACCL_COORDINATOR": "127.0.0.1:9"}, "127.0.0.1"),
        ({"MLX_JACCL_COORDINATOR": "[::1]:9"}, "::1"),
        ({"NCCL_HOST_IP": "::1"}, "::1"),
        ({"M7MLX_FIRST_HOST": "localhost"}, "127.0.0.1"),
    ],
)
def test_the_first_rank_listens_where_it_is_told(
    environment: dict[str, str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("M7MLX_FIRST_HOST", "MLX_HOSTFILE", "MLX_JACCL_COORDINATOR", "NCCL_HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world._first_address() == address


@pytest.mark.parametrize("name", ["no.such.host.invalid", "a" * 300, "1.2.3.4.5"])
def test_an_address_that_is_none_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M7MLX_FIRST_HOST", name)
    with pytest.raises(RunError, match="M7MLX_FIRST_HOST names"):
        world._first_address()


def test_an_address_of_another_machine_is_one_line() -> None:
    from m7mlx.parallel.channel import open_channel

    with pytest.raises(RunError, match=r"cannot listen at 192\.0\.2\.1 .*M7MLX_FIRST_HOST"):
        open_channel(2, "192.0.2.1", lambda port, key: None)
