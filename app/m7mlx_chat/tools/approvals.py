"""What the user has said of a tool: always, or never. It holds for the tool as it is.

A word is bound to how the server is started or reached, and to what the tool says of itself: a
server that changes the description of a tool that is allowed already is asked about anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from m7mlx.errors import ConfigError, DiskError
from m7mlx.files.disk import write_whole
from m7mlx.jsonfile import read_json
from m7mlx_chat.servers import Server

Standing = Literal["always", "never"]
_MOST_BYTES = 4 << 20


class Approvals:
    """The words that hold; kept in a file that only the user can read."""

    def __init__(self, path: Path | None) -> None:
        """Read the file; None keeps them as long as this object."""
        self._path = path
        self._words: dict[str, dict[str, str]] = {}
        self._read()

    def of(self, key: str) -> Standing | None:
        """The word on the tool that `key_of` names."""
        word = self._words.get(key, {}).get("word")
        return "always" if word == "always" else "never" if word == "never" else None

    def forget(self, tool: str) -> bool:
        """Let no word on a tool of this name hold any more; returns whether one did."""
        self._read()
        keys = [key for key, word in self._words.items() if tool in (word.get("tool"), _full(word))]
        for key in keys:
            del self._words[key]
        if keys:
            self._write()
        return bool(keys)

    def keep(self, key: str, word: Standing, server: str, tool: str) -> None:
        """Keep a word. Raises DiskError, and then it holds until the end."""
        self._read()  # another window may have written
        self._words[key] = {"word": word, "server": server, "tool": tool}
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            try:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))  # the user's alone
            except OSError as error:
                raise DiskError(f"{self._path} cannot be written ({error.strerror})") from None
            write_whole(self._path, json.dumps({"tools": self._words}, indent=1) + "\n")

    def _read(self) -> None:
        if self._path is None or not self._path.exists():
            return
        with suppress(ConfigError):  # of a file that is damaged nothing holds: each tool is asked about
            found = read_json(self._path, _MOST_BYTES).get("tools")
            for key, word in found.items() if isinstance(found, dict) else ():
                if isinstance(word, dict):
                    self._words[key] = {name: str(value) for name, value in word.items()}


def _full(word: Mapping[str, str]) -> str:
    return f"{word.get('server')}/{word.get('tool')}"


def key_of(server: Server, name: str, description: str, parameters: Mapping[str, Any]) -> str:
    """Name a tool as it is: with another command or description it is another tool."""
    told = [server.name, list(server.command), server.url, name, description, parameters]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
