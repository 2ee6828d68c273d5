"""A line from the first of several processes to the others: what to do, and whether all are there.

MLX's exchanges within a forward pass wait for ever if a process has died, and spin while they wait.
So whatever is not numbers goes through sockets of our own: they sleep, and they close when a
process ends.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from m7mlx.errors import RunError
from m7mlx.parallel.handshake import AT_ONCE, greet, meet

_SECONDS = 60.0  # for all to connect
KEY_BYTES = 16
_END = {"do": "end"}


class Channel:
    """Carries what the first rank `tell`s to the others, who `hear`; when one dies, all end."""

    def __init__(self) -> None:
        self._ending = threading.Event()
        self._sockets: list[socket.socket] = []
        self._heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to all others. If one cannot be reached, `_watch` ends this process."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            for one in self._sockets:
                try:
                    one.sendall(data)
                except OSError:  # its watcher says which it is
                    return

    def hear(self) -> dict[str, Any]:
        """Wait for a message: what the first rank tells, or what another answers it."""
        return self._heard.get()

    def close(self) -> None:
        """End the run: the others leave as well."""
        if not self._ending.is_set():
            self._ending.set()
            self.tell(_END)

    def _watch(self, one: socket.socket, rank: int) -> None:
        """Read what a rank says until the line closes, which nobody does before the end."""
        with one.makefile("rb") as lines:
            try:
                for line in lines:
                    message = json.loads(line)
                    if message == _END:
                        self._ending.set()
                        leave(0)
                    self._heard.put(message)
            except (OSError, ValueError):
                pass
        if not self._ending.is_set():
            die(f"process {rank} of this run has ended; the others cannot go on without it")

    def _add(self, one: socket.socket, rank: int) -> None:
        """Take a connection, and notice within 20 s if a machine at its end loses power."""
        one.settimeout(None)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
        interval, probes = getattr(socket, "TCP_KEEPINTVL", None), getattr(socket, "TCP_KEEPCNT", None)
        for option, seconds in ((idle, 5), (interval, 5), (probes, 3)):
            if option is not None:
                one.setsockopt(socket.IPPROTO_TCP, option, seconds)
        self._sockets.append(one)
        threading.Thread(target=self._watch, args=(one, rank), name=f"m7mlx-rank-{rank}", daemon=True).start()


def open_channel(size: int, address: str, publish: Callable[[int, bytes], object]) -> Channel:
    """Wait for all other ranks to connect; returns the first rank's end.

    size     number of ranks
    address  the one address to listen at
    publish  called with the port and the key, which it passes on to the others

    Raises RunError if it cannot listen there, or if the others do not come.
    """
    key = secrets.token_bytes(KEY_BYTES)
    channel = Channel()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, 0), family=family, backlog=AT_ONCE)
    except OSError as error:
        raise RunError(
            f"the first process cannot listen at {address} ({error.strerror}); M7MLX_FIRST_HOST names an address of "
            "its machine"
        ) from None
    with server:
        publish(server.getsockname()[1], key)
        for rank, one in meet(server, size, key, _SECONDS).items():
            channel._add(one, rank)
    return channel


def join_channel(rank: int, address: str, port: int, key: bytes) -> Channel:
    """Connect to the first rank; returns another rank's end.

    Raises RunError where the first rank cannot be reached, or somebody else answers.
    """
    until = time.monotonic() + _SECONDS
    while True:
        try:
            one = socket.create_connection((address, port), timeout=max(until - time.monotonic(), 0.1))
        except OSError as error:
            raise RunError(f"the first process cannot be reached at {address}:{port} ({error})") from None
        try:
            one.settimeout(_SECONDS)
            greet(one, rank, key)
            break
        except OSError as error:  # the first rank had to make room, among many strangers
            one.close()
            if time.monotonic() > until:
                raise RunError(f"the first process at {address}:{port} does not answer ({error})") from None
            time.sleep(0.1)
        except RunError:
            one.close()
            raise
    channel = Channel()
    channel._add(one, 0)
    return channel


def die(reason: str) -> NoReturn:
    """Leave at once with one line: nothing else ends a pass that waits for another process."""
    sys.stderr.write(f"m7mlx: error: {reason}\n")
    leave(1)


def leave(status: int) -> NoReturn:
    """End the process, from whatever thread."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)
