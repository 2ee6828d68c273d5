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
from m7mlx_chat.hub_search import Files, Offer

_LINE = 1 << 20  # bytes: the longest line that is read
_KILL_SECONDS = 5.0
_NAME = 100  # characters of a folder's name
_ASK_SECONDS = 30.0  # for the Hub to answer
Progress = Callable[[int, int, str], None]


async def fetch(name: str, progress: Progress) -> Path:
    """Download a model, convert it if it is a GGUF file, and return its folder.

    Cancelling leaves what is here for the next time. Raises RunError.
    """
    result = await _run([sys.executable, "-m", "m7mlx_chat.fetch", name], progress)
    return Path(result["folder"])


async def convert(source: str, bits: int | None, into: Path, progress: Progress) -> Path:
    """Run `m7mlx-convert` into a folder in `into`; return that folder. Raises RunError."""
    target = target_folder(source.rstrip("/").rpartition("/")[2], bits, into)
    return await convert_to(target, source, bits, progress)


async def convert_to(target: Path, source: str, bits: int | None, progress: Progress) -> Path:
    """Run `m7mlx-convert` into the folder `target`; return it. Raises RunError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    await _run(_converter(source, bits, target), progress)
    return target


async def plan(target: Path, source: str, bits: int | None) -> dict[str, Any]:
    """Return what a conversion would give, as `m7mlx-convert --plan` tells it.

    Raises RunError where the source cannot be converted, with the reason.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    return await _run([*_converter(source, bits, target), "--plan"], lambda done, total, task: None)


async def search(text: str) -> list[Offer]:
    """Search the Hub for models that can be used here. Raises RunError."""
    return [Offer(**offer) for offer in (await _ask("search", text))["offers"]]


async def list_files(repo: str) -> Files:
    """Return what a repository of the Hub holds of a model. Raises RunError."""
    result = await _ask("files", repo)
    return Files(result["nbytes"], result["is_native"], result["ggufs"])


async def _ask(kind: str, text: str) -> dict[str, Any]:
    try:
        async with asyncio.timeout(_ASK_SECONDS):
            command = [sys.executable, "-m", "m7mlx_chat.hub_search", kind, text]
            return await _run(command, lambda done, total, task: None)
    except TimeoutError:
        raise RunError("the Hub does not answer; check the network, or try again later") from None


def target_folder(name: str, bits: int | None, into: Path) -> Path:
    """Return the folder for the result of converting what is called `name`."""
    stem = re.sub(r"[^\w.-]+", "-", name.removesuffix(".gguf")).strip("-.")[:_NAME] or "model"
    return into / (f"{stem}-{bits}bit" if bits else stem)


def _converter(source: str, bits: int | None, target: Path) -> list[str]:
    command = [sys.executable, "-m", "m7mlx_convert", source, "--mlx-path", str(target), "--json"]
    return command + (["--q-bits", str(bits)] if bits else [])


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
                case "result" | "plan":
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
