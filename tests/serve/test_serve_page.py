"""The server's page in a real browser, headless Chromium, by the browser's own debugging protocol."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from test_serve import NAME, open_requests, serving


class Page:
    """A tab; what goes wrong in it is collected."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._count = socket, 0
        self.complaints: list[Any] = []

    async def call(self, method: str, **params: Any) -> Any:
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=30)
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(message["params"])
            if message.get("id") == self._count:
                return message["result"]

    async def value(self, expression: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    async def until(self, expression: str) -> Any:
        for _ in range(300):
            if value := await self.value(expression):
                return value
            await asyncio.sleep(0.1)
        raise AssertionError(f"it did not become true: {expression}")


@asynccontextmanager
async def browsing(profile: Path) -> AsyncIterator[Page]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command = [chromium, *options, f"--user-data-dir={profile}", "about:blank"]
    browser = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    assert browser.stderr is not None
    try:
        while not (found := re.search(rb"ws://([^/]+)/", await asyncio.wait_for(browser.stderr.readline(), 60))):
            pass
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{found[1].decode()}/json") as answer:
                tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
            async with session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Runtime", "Log", "Page"):
                    await page.call(f"{domain}.enable")
                yield page
    finally:
        browser.kill()
        await browser.communicate()


@pytest.mark.chromium
async def test_a_chat_in_the_browser(model_folder: Path, tmp_path: Path) -> None:
    with serving(model_folder) as (url, _):
        async with browsing(tmp_path) as page:
            await page.call("Page.navigate", url=url)
            assert await page.until("document.getElementById('model').textContent") == NAME
            hostile = "<img src=x onerror=alert(1)> Hello"
            await page.value(f"document.getElementById('question').value = {hostile!r}")
            await page.value("document.getElementById('ask').requestSubmit()")
            await page.until("!document.getElementById('stop').hidden")
            await page.until("document.querySelectorAll('.message')[1].textContent.length > 40")
            await page.value("document.getElementById('stop').click()")
            assert await page.until("document.getElementById('told').textContent") == "stopped"
            await page.until("document.getElementById('stop').hidden")
            shown = await page.value("[...document.querySelectorAll('.message')].map((e) => e.textContent)")
            assert shown[0] == hostile
            assert await page.value("document.querySelectorAll('img').length") == 0
            for _ in range(100):  # whoever stops gives the place back
                if open_requests(url) == 0:
                    break
                await asyncio.sleep(0.1)
            assert open_requests(url) == 0
            await page.value("document.getElementById('new').click()")
            assert await page.value("document.querySelectorAll('.message').length") == 0
            assert not page.complaints
