"""What may run unasked because the command line says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m7mlx.errors import InputError
from m7mlx_chat.servers import Server


@dataclass(frozen=True)
class Allowed:
    """Names of servers, or NAME/TOOL, that --allow-tool has given.

    asks  the user can be asked about all others
    """

    names: Sequence[str] = ()
    asks: bool = True

    def has(self, server: Server, tool: str) -> bool:
        """Whether a tool of a server is among the names."""
        return server.name in self.names or f"{server.name}/{tool}" in self.names

    def wants(self, server: Server) -> bool:
        """Whether to start a server: where nobody can be asked, only one that is named."""
        return self.asks or any(name.partition("/")[0] == server.name for name in self.names)

    def check(self, servers: Sequence[Server]) -> None:
        """Raise InputError for the name of a server that there is not."""
        known = [server.name for server in servers]
        for name in self.names:
            if name.partition("/")[0] not in known:
                there = ", ".join(known) or "none yet: [tools.NAME]"
                raise InputError(
                    f"--allow-tool: there is no server {name.partition('/')[0]!r}; config.toml has {there}"
                )
