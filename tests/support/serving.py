"""m7mlx-serve as a process of its own, and what its clients ask it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NotRequired, TypedDict

import httpx
import openai
from openai.types.chat import ChatCompletionUserMessageParam
from processes import piped, running

NAME = "small"


class Question(TypedDict):
    """The body of a request for a chat, and the arguments of the `openai` client's method."""

    model: str
    messages: list[ChatCompletionUserMessageParam]
    max_tokens: int
    temperature: NotRequired[float]
    logit_bias: NotRequired[dict[str, int]]


def user(text: str) -> list[ChatCompletionUserMessageParam]:
    return [{"role": "user", "content": text}]


CHAT: Question = {"model": NAME, "messages": user("Hi"), "max_tokens": 2}
ENDLESS: Question = {
    "model": NAME,
    "messages": user("Hi"),
    "temperature": 0,
    "max_tokens": 1_000_000,
    "logit_bias": {"2": -100},
}


@contextmanager
def serving(
    folder: Path, *options: str, files: int | None = None, setup: str = ""
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a server that may open at most `files` files; yield its address and its process.

    `setup` is Python that the process runs first.
    """
    program = ["-c", f"{setup}\nfrom m7mlx_serve.cli import main\nraise SystemExit(main())"]
    start = program if setup else ["-m", "m7mlx_serve"]
    on_disk = [] if "--prefix-disk" in options else ["--prefix-disk", "0"]
    command = [sys.executable, *start, "--model", str(folder), "--name", NAME, "--port", "0", *on_disk, *options]
    if files is not None:
        command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
    with running(command, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        for line in piped(process.stderr):
            said += line
            if found := re.search(r"http://\S+", line):
                yield found[0], process
                break
        else:
            raise AssertionError(said)


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def open_requests(url: str) -> float:
    found = re.search(r"^m7mlx_open_requests (\S+)", httpx.get(f"{url}/metrics").text, re.M)
    assert found
    return float(found[1])


def settle(url: str, count: int) -> None:
    """Wait until so many requests are open."""
    until = time.monotonic() + 20
    while open_requests(url) != count:
        assert time.monotonic() < until
        time.sleep(0.02)
