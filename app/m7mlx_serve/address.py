"""The address that the server listens on."""

from __future__ import annotations

import ipaddress
import socket

from m7mlx.errors import RunError


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def in_url(host: str) -> str:
    """A host as URLs have it: addresses with colons stand in brackets."""
    return f"[{host}]" if ":" in host else host


def bind(host: str, port: int) -> socket.socket:
    """Open a socket that nobody else gets; connections are refused until it listens.

    Raises RunError if the port is taken.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # also just after another server's end
        if bound.family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise _taken(host, port, error) from None
    return bound


def listen(bound: socket.socket, backlog: int) -> None:
    """Let connections come. Raises RunError if another server has been faster."""
    try:
        bound.listen(backlog)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _taken(host, port, error) from None


def _taken(host: str, port: int, error: OSError) -> RunError:
    return RunError(
        f"{in_url(host)}:{port} cannot be opened ({error.strerror or error}); choose another port with --port"
    )
