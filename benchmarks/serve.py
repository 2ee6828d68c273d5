"""m7mlx-serve against mlx_lm.server: tokens per second of all clients, time to a first token.

    python benchmarks/serve.py --model demo [--clients 1 4 16] [--rounds 3] [--requests 3]
        [--prompt 150]

Each round starts both servers in turn, one at a time, on the same weights (in float32) and the
same BLAS. Every client asks its questions one after the other (greedy, streamed) and asks the next
as soon as the last is answered. A scenario is run with prompts that have nothing in common, and
with prompts that begin with the same 512 words.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from common import machine_line, spread, table

_WORDS = ("fox", "river", "stone", "cloud", "lamp", "tree", "bird", "road", "bread", "glass", "wind", "ship", "door")
_PEER = (
    "from m7mlx.cpu import blas; import runpy; runpy.run_module('mlx_lm.server', run_name='__main__', alter_sys=True)"
)


@dataclass(frozen=True)
class Scenario:
    """One way to ask.

    clients  at a time
    shared   words that all prompts begin with
    """

    clients: int
    shared: int
    requests: int
    prompt: int
    tokens: int


@dataclass(frozen=True)
class Figures:
    """One measurement: tokens a second of all clients, seconds to a first token, memory in GB."""

    tps: float
    first: float
    memory: float


@contextlib.contextmanager
def serving(name: str, folder: Path, model: str, rows: int) -> Iterator[tuple[str, int]]:
    """Start a server; its address and process."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = str(found.getsockname()[1])
    ours = [sys.executable, "-m", "m7mlx_serve", "--model", str(folder), "--name", model, "--rows", str(rows)]
    theirs = [sys.executable, "-c", _PEER, "--model", str(folder), "--log-level", "ERROR"]
    theirs += ["--decode-concurrency", str(rows), "--prompt-concurrency", str(rows)]
    process = subprocess.Popen(
        [*(ours if name == "m7mlx" else theirs), "--port", port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v1/models", timeout=5):
                break
            if process.poll() is not None:
                raise SystemExit(f"{name} has ended with {process.returncode}")
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(30)


def prompt(seed: str, scenario: Scenario) -> str:
    """A text of its own, after the one that all share."""
    common, own = random.Random("shared"), random.Random(seed)
    return " ".join([*common.choices(_WORDS, k=scenario.shared), *own.choices(_WORDS, k=scenario.prompt)])


async def ask(session: aiohttp.ClientSession, url: str, model: str, text: str, tokens: int) -> tuple[int, float]:
    """Tokens of the answer, and seconds to the first."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text + "\nWrite a long story in which these words occur."}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, count = time.perf_counter(), 0.0, 0
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if any(choice["delta"].get("content") for choice in event["choices"]):
                first = first or time.perf_counter() - began
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
    return count, first or time.perf_counter() - began


async def drive(url: str, model: str, scenario: Scenario, round_: int) -> tuple[float, float]:
    """Tokens per second of all clients together, p95 of the seconds to a first token."""
    timeout = aiohttp.ClientTimeout(total=3600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client(number: int) -> list[tuple[int, float]]:
            texts = [prompt(f"{scenario} {round_} {number} {i}", scenario) for i in range(scenario.requests)]
            return [await ask(session, url, model, text, scenario.tokens) for text in texts]

        began = time.perf_counter()
        found = [one for many in await asyncio.gather(*map(client, range(scenario.clients))) for one in many]
        seconds = time.perf_counter() - began
    firsts = [first for _, first in found]
    p95 = statistics.quantiles(firsts, n=20, method="inclusive")[-1] if len(firsts) > 1 else firsts[0]
    return sum(count for count, _ in found) / seconds, p95


def measure(name: str, folder: Path, scenario: Scenario, round_: int) -> Figures:
    """A fresh server in one scenario, warmed by one short question."""
    model = "demo" if name == "m7mlx" else str(folder)
    with serving(name, folder, model, max(scenario.clients, 1)) as (url, process):
        asyncio.run(drive(url, model, Scenario(1, 0, 1, 4, 4), round_))
        tps, first = asyncio.run(drive(url, model, scenario, round_))
        status = Path(f"/proc/{process}/status")
        peak = 0
        if status.exists():
            peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return Figures(tps, first, peak / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=150, metavar="WORDS")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", choices=("own", "shared"))
    args = parser.parse_args()
    from m7mlx_bench.models import find_readable

    from m7mlx.files.hub import resolve

    with tempfile.TemporaryDirectory() as scratch:
        folder, _ = find_readable("transformers", resolve(args.model), Path(scratch))  # in float32
        rows = []
        for shared in (0, 512):
            if args.only and (args.only == "shared") != bool(shared):
                continue
            for clients in args.clients:
                scenario = Scenario(clients, shared, args.requests, args.prompt, args.tokens)
                found: dict[str, list[Figures]] = {"m7mlx": [], "mlx-lm": []}
                for round_ in range(args.rounds):
                    for name in found:
                        found[name].append(measure(name, folder, scenario, round_))
                        print(f"{clients} clients, {shared} shared, {name}: {found[name][-1]}", file=sys.stderr)
                pairs = list(zip(found["m7mlx"], found["mlx-lm"], strict=True))
                row = [str(clients), "yes" if shared else "no"]
                row += [spread([f.tps for f in found[name]], 1) for name in found]
                row.append(spread([a.tps / b.tps for a, b in pairs], 2, "×"))
                row += [spread([f.first for f in found[name]], 2, " s") for name in found]
                row.append(spread([b.first / a.first for a, b in pairs], 2, "×"))
                row += [f"{max(f.memory for f in found[name]):.2f} GB" for name in found]
                rows.append(row)
    print(machine_line())
    table(
        [
            *("clients", "shared start", "m7mlx, tok/s", "mlx-lm", "ratio"),
            *("m7mlx, p95 to first", "mlx-lm", "ratio", "m7mlx, memory", "mlx-lm"),
        ],
        rows,
    )


if __name__ == "__main__":
    main()
