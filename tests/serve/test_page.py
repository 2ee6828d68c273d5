"""The server's page in a real browser."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from browser import browsing
from serving import NAME, open_requests, serving


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
