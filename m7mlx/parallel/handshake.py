"""The meeting of a run's processes on a network that strangers may use as well.

    first → other   32 random bytes
    other → first   its rank, 32 random bytes of its own, a MAC over its role, its rank and both
    first → other   a MAC over the first one's role, that rank and both

Each proves that it has the key without telling it. What was said before, or by the other side,
proves nothing if it is said again.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import time
from collections.abc import Container
from dataclasses import dataclass, field

from m7mlx.errors import RunError

# Callers that have not said yet who they are; beyond that, who has waited longest makes room.
AT_ONCE = 64
_CALLER_SECONDS = 5.0  # for each to say who it is
_NONCE = _MAC = 32
_GREETING = 2 + _NONCE + _MAC


@dataclass
class _Caller:
    """A connection whose other end has not said yet who it is."""

    socket: socket.socket
    until: float
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(_NONCE))
    said: bytes = b""


def meet(server: socket.socket, size: int, key: bytes, seconds: float) -> dict[int, socket.socket]:
    """Return the connections of ranks 1 … size − 1; send strangers away, whatever they say.

    All callers are heard at the same time, each for a few seconds. Raises RunError if a rank has
    not come in time.
    """
    deadline = time.monotonic() + seconds
    found: dict[int, socket.socket] = {}
    callers: dict[socket.socket, _Caller] = {}  # in the order in which they came
    server.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)

        def send_away(one: socket.socket) -> None:
            selector.unregister(one)
            del callers[one]
            one.close()

        try:
            while len(found) < size - 1:
                now = time.monotonic()
                for one in [one for one, caller in callers.items() if caller.until <= now]:
                    send_away(one)
                if now >= deadline:
                    missing = sorted(set(range(1, size)) - set(found))
                    raise RunError(
                        f"process {', '.join(map(str, missing))} of {size} did not come within {seconds:.0f} s"
                    )
                wait = min([deadline, *(caller.until for caller in callers.values())]) - now
                for ready, _ in selector.select(max(wait, 0)):
                    caller: _Caller | None = ready.data
                    if caller is None:  # somebody calls
                        if len(callers) >= max(AT_ONCE, 2 * size):
                            send_away(next(iter(callers)))
                        if new := _accept(server):
                            callers[new.socket] = new
                            selector.register(new.socket, selectors.EVENT_READ, new)
                        elif callers:  # no file number is left, perhaps
                            send_away(next(iter(callers)))
                    elif caller.socket in callers:
                        rank = _hear(caller, size, found, key)
                        if rank == 0:
                            send_away(caller.socket)
                        elif rank is not None:
                            selector.unregister(caller.socket)
                            del callers[caller.socket]
                            found[rank] = caller.socket
        except BaseException:
            for one in found.values():
                one.close()
            raise
        finally:
            for one in list(callers):
                send_away(one)
    return found


def _accept(server: socket.socket) -> _Caller | None:
    """Take a connection and send it a nonce; None if there is none to take."""
    try:
        one, _ = server.accept()
    except BlockingIOError:
        return None
    except OSError:  # it has gone already; or no file number is left, now and at the next look
        time.sleep(0.05)
        return None
    caller = _Caller(one, time.monotonic() + _CALLER_SECONDS)
    one.setblocking(False)
    with contextlib.suppress(OSError):  # it has gone: the next look at it says so
        one.send(caller.nonce)
    return caller


def _hear(caller: _Caller, size: int, found: Container[int], key: bytes) -> int | None:
    """Return the rank that a caller has proven to be: None for not yet, 0 for a stranger."""
    try:
        more = caller.socket.recv(_GREETING - len(caller.said))
        caller.said += more
        if not more:
            return 0
        if len(caller.said) < _GREETING:
            return None
        rank = int.from_bytes(caller.said[:2], "big")
        nonces = caller.nonce + caller.said[2 : 2 + _NONCE]
        if not hmac.compare_digest(caller.said[2 + _NONCE :], _mac(key, b"other", rank, nonces)):
            return 0
        if not 0 < rank < size or rank in found:
            return 0
        caller.socket.send(_mac(key, b"first", rank, nonces))
    except BlockingIOError:
        return None
    except OSError:
        return 0
    return rank


def greet(one: socket.socket, rank: int, key: bytes) -> None:
    """Prove to the first process that this is `rank`, and have it prove that it is the first.

    Raises OSError if it does not answer, RunError if it has not got the key.
    """
    nonces = _exactly(one, _NONCE) + secrets.token_bytes(_NONCE)
    one.sendall(rank.to_bytes(2, "big") + nonces[_NONCE:] + _mac(key, b"other", rank, nonces))
    if not hmac.compare_digest(_exactly(one, _MAC), _mac(key, b"first", rank, nonces)):
        raise RunError("somebody else answers at the address of the first process; nothing was told to them")


def _mac(key: bytes, role: bytes, rank: int, nonces: bytes) -> bytes:
    return hmac.digest(key, b"m7mlx " + role + rank.to_bytes(2, "big") + nonces, "sha256")


def _exactly(one: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = one.recv(count - len(data))
        if not more:
            raise OSError("closed")
        data += more
    return data
