"""Long work in processes of their own, which tell of their progress in JSON, one object a line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m7mlx.errors import RunError

_LINE = 1 << 20  # bytes: the longest line that is read
_KILL_SECONDS = 5.0
Progress = Callable[[int, int, str], None]


async def fetch(name: str, progress: Progress) -> Path:
    """Download a model, convert it if it is a GGUF file, and return its folder.

    Cancelling leaves what is here for the next time. Raises RunError.
    """
    result = await _run([sys.executable, "-m", "m7mlx_chat.fetch", name], progress)
    return Path(result["folder"])


async def convert(source: str, bits: int | None, into: Path, progress: Progress) -> Path:
    """Run `m7mlx-convert` into a folder in `into`; return that folder. Raises RunError."""
    stem = (
        re.sub(r"[^\w.-]+", "-", source.rstrip("/").rpartition("/")[2].removesuffix(".gguf")).strip("-.") or "model"
    )
    target = into / (f"{stem}-{bits}bit" if bits else stem)
    into.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "m7mlx_convert", source, "--mlx-path", str(target), "--json"]
    await _run(command + (["--q-bits", str(bits)] if bits else []), progress)
    return target


async def _run(command: list[str], progress: Progress) -> dict[str, Any]:
    """Run a command to its end; return its last result event."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # too long a name, one with a NUL
        raise RunError(f"{command[2]} cannot be started ({error})") from None
    result: dict[str, Any] = {}
    message = ""
    assert process.stdout is not None and process.stderr is not None
    said = asyncio.create_task(_last_error(process.stderr))
    try:
        async for line in process.stdout:
            event = _event(line)
            match event.get("event"):
                case "progress":
                    progress(int(event["done"]), int(event["total"]), str(event.get("task", "")))
                case "error":
                    message = str(event.get("message") or event.get("text") or "")
                case "result":
                    result = event
                case _:
                    pass
        status = await process.wait()
        cause = await said
    finally:
        said.cancel()
        await _end(process)
    if status:
        message = message or f"{command[2]} failed (exit status {status})"
        raise RunError(f"{message}: {cause}" if cause and cause not in message else message)
    return result


async def _last_error(lines: asyncio.StreamReader) -> str:
    """Pass what a process says on to the app's log; returns the last error that it names."""
    end = b""
    while piece := await lines.read(_LINE):
        os.write(2, piece)
        end = (end + piece)[-_LINE:]
    errors = [line for line in end.decode("utf-8", "replace").splitlines() if line.startswith("ERROR:")]  # pip's
    return errors[-1].removeprefix("ERROR:").strip() if errors else ""


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the process and those it started, first kindly."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _KILL_SECONDS)
