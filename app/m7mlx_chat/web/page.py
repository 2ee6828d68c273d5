"""One page of the browser: a chat in a process of its own, which ends with the page."""

from __future__ import annotations

import asyncio
import contextlib
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence

from aiohttp import WSMsgType, web
from textual_serve.app_service import AppService
from textual_serve.download_manager import DownloadManager

from m7mlx.terminal import one_line
from m7mlx_chat.environment import ENGINE_FILE
from m7mlx_chat.web.shared import SharedEngine

_END, _KILL = 10.0, 2.0  # seconds for a chat to keep what was said; then SIGTERM, then SIGKILL
_ERRORS = 4096  # bytes of what a chat says on stderr that are looked at
_COLUMNS, _ROWS = 500, 300


class Page(AppService):
    """A chat's process behind a websocket, in textual-serve's protocol."""

    def __init__(
        self,
        command: Sequence[str],
        engine: SharedEngine,
        socket: web.WebSocketResponse,
        downloads: DownloadManager,
    ) -> None:
        super().__init__(
            "",
            write_bytes=socket.send_bytes,
            write_str=socket.send_str,
            close=self._close,
            download_manager=downloads,
        )
        self._arguments = command
        self._engine = engine
        self._socket = socket
        self._is_stopped = False

    async def serve(self, columns: int, rows: int) -> None:
        """Run the chat until it, or the page, has ended."""
        try:
            await self.start(*_bounded(columns, rows))
            async for message in self._socket:
                if message.type is WSMsgType.TEXT:
                    await self._take(message.data)
        finally:
            await asyncio.shield(self.stop())

    async def stop(self) -> None:
        """End the chat's process, in any case."""
        if (process := self._process) is None or self._is_stopped:
            return
        self._is_stopped = True
        await self._download_manager.cancel_app_downloads(self.app_service_id)
        self.stdin.close()  # that is what tells it to end
        for end, seconds in ((process.terminate, _END), (process.kill, _KILL)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), seconds)
            if process.returncode is None:
                end()
        await process.wait()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_KILL)
            self._task.cancel()  # it waits for a page that takes nothing

    @property
    def is_alive(self) -> bool:
        """Whether the chat's process is there, or about to be."""
        return self._process is None or self._process.returncode is None

    def kill(self) -> None:
        """End the chat's process at once."""
        if self._process is not None and self.is_alive:
            self._process.kill()

    # --- what the page says -----------------------------------------------------------------------

    async def _take(self, data: str) -> None:
        match json.loads(data):
            case ["stdin", str(text)]:
                await self.send_bytes(text.encode("utf-8", "replace"))
            case ["resize", {"width": int(columns), "height": int(rows)}]:
                await self.set_terminal_size(*_bounded(columns, rows))
            case ["ping", str(text)]:
                await self._socket.send_json(["pong", text])
            case ["blur"]:
                await self.blur()
            case ["focus"]:
                await self.focus()
            case _:
                raise ValueError("not a message of textual-serve's page")

    # --- what the chat says -----------------------------------------------------------------------

    def _build_environment(self, width: int = 80, height: int = 24) -> dict[str, str]:
        driver = {"TEXTUAL_DRIVER": "m7mlx_chat.web.driver:ServedDriver"}
        return {**super()._build_environment(width, height), **driver}

    async def _open_app_process(self, width: int = 80, height: int = 24) -> Process:
        with self._engine.lend() as theirs:
            environment = self._build_environment(width, height) | {ENGINE_FILE: str(theirs.fileno())}
            self._process = process = await asyncio.create_subprocess_exec(
                *self._arguments,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=environment,
                pass_fds=[theirs.fileno()],
                # A session of its own: Ctrl-C is for the server, which then ends its chats.
                start_new_session=True,
            )
        self._stdin = process.stdin
        return process

    async def run(self) -> None:
        """Bring to the page what the chat draws, and why it has ended; close the page."""
        assert self._process is not None and self._process.stdout is not None
        output = self._process.stdout
        errors = asyncio.create_task(self._errors())
        with contextlib.suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, KeyError):
            await output.readuntil(b"__GANGLION__\n")
            while True:
                head = await output.readexactly(5)
                payload = await output.readexactly(int.from_bytes(head[1:], "big"))
                take = {b"D": self.on_data, b"M": self.on_meta, b"P": self.on_packed}[head[:1]]
                # the page has gone; what comes is read all the same
                with contextlib.suppress(ConnectionError):
                    await take(payload)
        if said := await errors:
            with contextlib.suppress(ConnectionError):
                await self.on_data(b"\r\n" + said.encode())
        await self._close()

    async def on_meta(self, data: bytes) -> None:
        """Bring to the page what is not drawn: its title, and what textual-serve knows besides."""
        match json.loads(data):
            case {"type": "title", "title": str(title)}:
                await self._socket.send_json(["title", title])
            case _:
                await super().on_meta(data)

    async def _errors(self) -> str:
        """The last line that the chat says on stderr."""
        assert self._process is not None and self._process.stderr is not None
        said = b""
        while data := await self._process.stderr.read(_ERRORS):
            said = (said + data)[-_ERRORS:]
        return one_line((said.decode("utf-8", "replace").strip().splitlines() or [""])[-1])

    async def _close(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._socket.close()


def _bounded(columns: int, rows: int) -> tuple[int, int]:
    return max(1, min(columns, _COLUMNS)), max(1, min(rows, _ROWS))
