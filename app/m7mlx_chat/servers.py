"""Servers of tools, as config.toml names them.

[tools.files]
command = ["npx", "-y", "@modelcontextprotocol/server-filesystem", "/home/me/notes"]
env = { LOG = "off" }

[tools.search]
url = "http://127.0.0.1:8000/mcp"
headers = { Authorization = "Bearer …" }
timeout = 30
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from m7mlx.errors import InputError

SECONDS = 60.0  # for a server to start, and for a call, where nothing else is said
ROUNDS = 10  # of calls in one answer, where nothing else is said
_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
_KEYS = {"command", "url", "env", "headers", "timeout"}


@dataclass(frozen=True)
class Server:
    """One server of tools: a program of this machine that `command` starts, or one at a `url`.

    env      variables that the program gets, beside the few that every program needs
    headers  HTTP headers that go with each request
    timeout  seconds for the server to start, and for each call
    """

    name: str
    command: tuple[str, ...] = ()
    url: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = SECONDS

    @property
    def address(self) -> str:
        """What is started, or asked."""
        return " ".join(self.command) or self.url


def read_servers(tables: object) -> tuple[Server, ...]:
    """The servers of config.toml's tables [tools.NAME]. Raises InputError."""
    if not isinstance(tables, dict):
        raise InputError("tools are tables: [tools.name]")
    return tuple(_server(name, table) for name, table in tables.items())


def _server(name: str, table: object) -> Server:
    where = f"[tools.{name}]"
    if not _NAME.fullmatch(name):
        raise InputError(f"{where}: a name has letters, digits, - and _, at most 32")
    if not isinstance(table, dict):
        raise InputError(f'tools are tables: {where} with command = ["program", "argument"] or url = "http://…"')
    if unknown := sorted(set(table) - _KEYS):
        raise InputError(f"{where}: there is no setting {unknown[0]!r}; there are {', '.join(sorted(_KEYS))}")
    if ("command" in table) == ("url" in table):
        raise InputError(f'{where} needs either command = ["program", "argument"] or url = "http://…"')
    command, url, timeout = table.get("command", []), table.get("url", ""), table.get("timeout", SECONDS)
    if "command" in table and not (isinstance(command, list) and command and all(map(_is_text, command))):
        raise InputError(f'{where}: command is a list of texts: command = ["program", "argument"]')
    if "url" in table and not _is_address(url):
        raise InputError(f'{where}: url is an address: url = "http://127.0.0.1:8000/mcp"')
    if type(timeout) not in (int, float) or not 0 < timeout <= 86_400:
        raise InputError(f"{where}: timeout is a number of seconds")
    return Server(
        name,
        tuple(command),
        url,
        _texts(where, "env", table.get("env", {})),
        _texts(where, "headers", table.get("headers", {})),
        float(timeout),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _is_address(url: Any) -> bool:
    if not isinstance(url, str):
        return False
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _texts(where: str, key: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) and "\0" not in text for text in value.values()):
        raise InputError(f'{where}: {key} is a table of texts: {key} = {{ NAME = "value" }}')
    return dict(value)
