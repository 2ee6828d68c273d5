"""What the session knows of tools, and the one thread that speaks with their servers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from m7mlx.errors import InputError, RunError
from m7mlx.terminal import one_line
from m7mlx_chat.event_queue import EventQueue
from m7mlx_chat.events import Event, Given, Listed, Listing, Verdict, Word
from m7mlx_chat.servers import Server
from m7mlx_chat.steps import Call, Outcome
from m7mlx_chat.tools.allowed import Allowed
from m7mlx_chat.tools.approvals import Approvals
from m7mlx_chat.tools.check import Checker
from m7mlx_chat.tools.connection import Connection
from m7mlx_chat.tools.offers import Offer, named

THREAD = "m7mlx tools"
_END_SECONDS = 4.0  # for the servers to end


class Toolbox:
    """The tools of all servers: what the model is told of, and what may run (`AnyTools`)."""

    def __init__(self, servers: Sequence[Server], allowed: Allowed, approvals: Path | None) -> None:
        """Start the servers.

        approvals  the file of what the user has said of tools; None keeps that in memory
        """
        self.is_on = True
        self._allowed = allowed
        self._approvals = Approvals(approvals)
        self._checker = Checker()
        self._events = EventQueue()
        self._future: Future[None] | None = None  # the call under way
        for name in ("mcp", "client", "httpx2", "asyncio"):  # what fails is told; the rest is noise
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._loop = asyncio.new_event_loop()
        self._connections = [
            Connection(server, partial(self._events.put, Listed(server.name)))
            for server in servers
            if allowed.wants(server)
        ]
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    # --- for the session --------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        return not self.is_on or all(one.state != "starting" for one in self._connections)

    def functions(self) -> list[dict[str, Any]]:
        return [{"name": name, **offer.function} for name, offer in self._named().items() if self._may(offer)]

    def judge(self, call: Call) -> tuple[Verdict, str]:
        offer = self._named().get(call.name)
        if offer is None or not self._may(offer):
            return "refuse", f"there is no tool {one_line(call.name)[:60]!r}"
        if call.values is None:
            return "refuse", "the arguments are no JSON object"
        if self._allowed.has(offer.server, offer.name) or (
            self._allowed.asks and self._approvals.of(offer.key) == "always"
        ):
            return "make", ""
        return "ask", ""

    def about(self, call: Call) -> str:
        offer = self._named().get(call.name)
        return f"a tool of {offer.server.name}: {offer.server.address}" if offer is not None else ""

    def forget(self, tool: str) -> bool:
        return self._approvals.forget(tool)

    def remember(self, call: Call, word: Word) -> None:
        offer = self._named().get(call.name)
        if offer is not None and (word == "always" or word == "never"):
            self._approvals.keep(offer.key, word, offer.server.name, offer.name)

    def make(self, call: Call) -> None:
        offer = self._named().get(call.name)
        values = call.values
        if offer is None or values is None:
            self._events.put(Given(call.id, "failed", "the tool is not there any more"))
            return
        self._future = asyncio.run_coroutine_threadsafe(self._make(call.id, offer, values), self._loop)

    def cancel(self) -> None:
        if self._future is not None:
            self._future.cancel()
            self._future = None

    def drain(self) -> list[Event]:
        return self._events.drain()

    def check(self) -> None:
        """Raise RunError for a server that has failed, InputError for a tool that it has not.

        For where nobody can be asked: whoever allows a tool wants it.
        """
        for one in self._connections:
            if one.state == "failed":
                raise RunError(f"the server of tools {one.server.name} is not there: {one.why}")
            wanted = {
                name.partition("/")[2] for name in self._allowed.names if name.startswith(f"{one.server.name}/")
            }
            if missing := sorted(wanted - {offer.name for offer in one.offers}):
                raise InputError(f"--allow-tool: the server {one.server.name} has no tool {missing[0]!r}")

    def overview(self) -> list[Listing]:
        return [self._listing(one) for one in self._connections]

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_END_SECONDS)
        for connection in self._connections:
            connection.line.kill()
        self._checker.close()

    def _named(self) -> dict[str, Offer]:
        if not self.is_on:
            return {}
        return named([offer for one in self._connections for offer in one.offers])

    def _may(self, offer: Offer) -> bool:
        """Whether the model is told of a tool at all."""
        if self._allowed.has(offer.server, offer.name):
            return True
        return self._allowed.asks and self._approvals.of(offer.key) != "never"

    def _listing(self, one: Connection) -> Listing:
        told = []
        for offer in one.offers:
            word = self._approvals.of(offer.key) or "asks"
            told.append(
                (offer.name, offer.description, "always" if self._allowed.has(offer.server, offer.name) else word)
            )
        left_out = [(name, "", "left out") for name in one.left_out]
        return Listing(one.server.name, one.server.address, one.state, one.why, (*told, *left_out))

    # --- on the thread of the servers -------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        tasks = [asyncio.create_task(one.run()) for one in self._connections]
        try:
            await self._stop.wait()
        finally:
            calls = asyncio.all_tasks() - {*tasks, asyncio.current_task()}
            for task in (*tasks, *calls):
                task.cancel()
            await asyncio.gather(*tasks, *calls, return_exceptions=True)

    async def _make(self, call: str, offer: Offer, values: dict[str, Any]) -> None:
        outcome: Outcome = "failed"
        try:
            result = await asyncio.to_thread(self._checker.wrong, offer.parameters, values)
            if result:
                result = f"the arguments do not fit: {result}"
            else:
                connection = next(one for one in self._connections if one.server is offer.server)
                outcome, result = await connection.call(offer.name, values)
        except Exception as error:  # nobody foresaw it: the answer goes on
            result = one_line(f"{type(error).__name__}: {error}")[:300]
        self._events.put(Given(call, outcome, result))
