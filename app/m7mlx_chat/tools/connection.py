"""One server of tools: started, asked what it has, called; given up when it does not answer.

The SDK is imported on the servers' thread: it takes half a second, and the screen need not wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from m7mlx.errors import InputError
from m7mlx.terminal import one_line
from m7mlx_chat.servers import Server
from m7mlx_chat.steps import Outcome
from m7mlx_chat.tools.line import Line
from m7mlx_chat.tools.offers import Offer, offer_of
from m7mlx_chat.tools.results import bounded

if TYPE_CHECKING:
    from mcp import Client

_MOST_TOOLS = 128  # of a server
_LONGEST = 300  # characters of why something failed


class Connection:
    """A server, and how it is now. All of it belongs to the loop that `run` runs on.

    state     how it is
    why       it has failed
    offers    its tools, as it listed them last
    left_out  what it has that a model cannot be told of, and why
    line      the bytes to it
    """

    def __init__(self, server: Server, on_change: Callable[[], None]) -> None:
        self.server = server
        self.state: Literal["starting", "ready", "failed"] = "starting"
        self.why = ""
        self.offers: tuple[Offer, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self.line = Line(lambda: None)
        self._on_change = on_change
        self._client: Client | None = None
        # the server has told what it has, or has failed; it has ended; a call wants it again
        self._settled, self._over, self._wanted = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Keep the connection, until this is cancelled; one that has failed is made when wanted."""
        while True:
            await self._keep()
            self._over.set()
            await self._wanted.wait()
            self._over.clear()
            self._wanted.clear()

    async def _keep(self) -> None:
        broken, ready = asyncio.Event(), asyncio.Event()

        def end() -> None:
            self._client = None
            broken.set()

        self.line = Line(end)
        task = asyncio.create_task(self._serve(ready, broken))
        waiting = asyncio.create_task(ready.wait())
        try:
            await asyncio.wait({task, waiting}, timeout=self.server.timeout, return_when=asyncio.FIRST_COMPLETED)
            if not ready.is_set() and not task.done():
                self.line.end(f"it did not answer within {self.server.timeout:g} s")
                self.line.kill()
                task.cancel()
            await asyncio.wait({task})
        finally:
            waiting.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
            self._client = None
            self._change("failed", self._why(None if task.cancelled() else task.exception()))

    async def _serve(self, ready: asyncio.Event, broken: asyncio.Event) -> None:
        from m7mlx_chat.tools.client import connected, listed

        async with connected(self.server, self.line) as client:
            self._take(await listed(client))
            self._client = client
            self._change("ready", "")
            ready.set()
            await broken.wait()

    def _change(self, state: Literal["ready", "failed"], why: str) -> None:
        self.state, self.why = state, why
        self._settled.set()
        self._on_change()

    def _take(self, tools: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
        found: list[Offer] = []
        left_out = [f"{len(tools) - _MOST_TOOLS:,} more than {_MOST_TOOLS}"] if len(tools) > _MOST_TOOLS else []
        for name, description, parameters in tools[:_MOST_TOOLS]:
            try:
                found.append(offer_of(self.server, name, description, parameters))
            except InputError as error:
                left_out.append(f"{one_line(name)[:60]} ({error})")
        self.offers, self.left_out = tuple(found), tuple(left_out)

    async def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[Outcome, str]:
        """Call a tool: how that ended, and what it gave. A server that is gone is started anew."""
        from m7mlx_chat.tools.client import called

        if self._client is None:
            if self.state != "starting":
                await self._over.wait()
                self._settled.clear()
                self.state = "starting"
                self._wanted.set()
            await self._settled.wait()
        client = self._client
        if client is None:
            return "failed", bounded(f"the server {self.server.name} is not there: {self.why}")
        try:
            return await called(client, name, arguments, self.server.timeout)
        except TimeoutError:
            why = f"the tool did not answer within {self.server.timeout:g} s"
            self.line.end(why)
        except Exception as error:
            why = self._why(error)
            if self.server.url:  # what an address does is seen by its answers alone
                self.line.end(why)
        return "failed", why

    def _why(self, error: BaseException | None) -> str:
        """Why something failed, in a line."""
        from m7mlx_chat.tools.client import told

        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, FileNotFoundError) and self.server.command:
            return f"there is no program {self.server.command[0]}"
        why = self.line.why or told(error) or "it has ended"
        said = self.line.said.decode("utf-8", "replace").strip().splitlines()
        return one_line(f"{why}; it said: {said[-1]}" if said and not told(error) else why)[:_LONGEST]
