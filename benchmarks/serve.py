"""m7mlx-serve against other servers: tokens per second of all clients, time to a first token.

    python benchmarks/serve.py --model demo [--servers m7mlx mlx-lm llama.cpp] [--clients 1 4 16]
        [--rounds 3] [--requests 3] [--prompt 150] [--float32]

    m7mlx             m7mlx-serve
    mlx-lm            mlx_lm.server
    llama.cpp         its own llama-server, which is on the PATH or given with --llama-server; it
                      has a slot for every client
    llama-cpp-python  llama_cpp.server, of the Python that is given with --llama-python
                      (pip install 'llama-cpp-python[server]'); it answers one request at a time

Each round starts the servers in turn, one at a time, on the same packed weights: a model folder,
for mlx-lm with scales in float32 on a processor, for llama.cpp the GGUF file that the demo model
comes from, or that is given with --gguf; or on the same weights in float32, without llama.cpp. MLX
has the same BLAS in both. Every client asks its questions one after the other (greedy, streamed)
and asks the next as soon as the last is answered. A scenario is run with prompts that have nothing
in common, and with prompts that begin with the same 512 words.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
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
from m7mlx_bench.models import find_readable

from m7mlx.files.demo import fetch_demo_gguf
from m7mlx.files.hub import resolve

_WORDS = ("fox", "river", "stone", "cloud", "lamp", "tree", "bird", "road", "bread", "glass", "wind", "ship", "door")
SERVERS = ("m7mlx", "mlx-lm", "llama.cpp", "llama-cpp-python")
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


@dataclass(frozen=True)
class Server:
    """A server to measure, without its options that depend on the scenario.

    model  what requests call the model
    """

    name: str
    command: tuple[str, ...]
    model: str

    def start(self, port: int, scenario: Scenario) -> subprocess.Popen[bytes]:
        """Start it, for as many clients and as long a context as a scenario needs."""
        clients, context = str(scenario.clients), 2 * (scenario.shared + scenario.prompt) + scenario.tokens + 128
        options = {
            "m7mlx": ["--rows", clients],
            "mlx-lm": ["--decode-concurrency", clients, "--prompt-concurrency", clients],
            "llama.cpp": ["--parallel", clients, "--ctx-size", str(scenario.clients * context)],
            "llama-cpp-python": ["--n_ctx", str(context)],
        }
        command = [*self.command, *options[self.name], "--port", str(port)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def serving(server: Server, scenario: Scenario) -> Iterator[tuple[str, int]]:
    """Start a server; its address and process."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    process = server.start(port, scenario)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(3000):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v1/models", timeout=5):
                break
            if process.poll() is not None:
                raise SystemExit(f"{server.name} has ended with {process.returncode}: {' '.join(server.command)}")
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(30)


def find_servers(args: argparse.Namespace, scratch: Path) -> list[Server]:
    """The servers that were asked for, with their commands and what each reads."""
    folder = resolve(args.model)
    if args.float32:
        folder = find_readable("transformers", folder, scratch)[0]
    found = []
    for name in args.servers or [*("m7mlx", "mlx-lm"), *(["llama.cpp"] if args.llama_server else [])]:
        command, model = [sys.executable, "-m", "m7mlx_serve", "--model", str(folder), "--name", "model"], "model"
        command += ["--prefix-disk", "0"]
        if name == "mlx-lm":
            model = str(find_readable("mlx-lm", folder, scratch)[0])
            command = [sys.executable, "-c", _PEER, "--model", model, "--log-level", "ERROR"]
        elif name.startswith("llama"):
            given = args.llama_server if name == "llama.cpp" else args.llama_python
            if args.float32 or not given:
                raise SystemExit(f"{name} needs {'packed weights' if args.float32 else 'its program: see --help'}")
            if not args.gguf and args.model != "demo":
                raise SystemExit(f"{name} needs the same model as a GGUF file with its tokenizer: --gguf")
            gguf, cores = str(args.gguf or fetch_demo_gguf()), str(os.cpu_count())
            command = [given, "--model", gguf, "--threads", cores, "--no-ui", "--log-disable"]
            if name == "llama-cpp-python":
                command = [given, "-m", "llama_cpp.server", "--model", gguf, "--n_threads", cores]
                command += ["--n_threads_batch", cores, "--flash_attn", "true", "--interrupt_requests", "false"]
        found.append(Server(name, tuple(command), model))
    return found


def prompt(seed: str, scenario: Scenario) -> str:
    """A text of its own, after the one that all share."""
    common, own = random.Random("shared"), random.Random(seed)
    return " ".join([*common.choices(_WORDS, k=scenario.shared), *own.choices(_WORDS, k=scenario.prompt)])


async def ask(session: aiohttp.ClientSession, url: str, model: str, text: str, tokens: int) -> tuple[int, float]:
    """Tokens of the answer, and seconds to the first.

    llama_cpp.server does not tell how many tokens there were: its events are counted.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text + "\nWrite a long story in which these words occur."}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, count, events = time.perf_counter(), 0.0, 0, 0
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if any(choice["delta"].get("content") for choice in event["choices"]):
                first = first or time.perf_counter() - began
                events += 1
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
    return count or events, first or time.perf_counter() - began


async def drive(url: str, model: str, scenario: Scenario, round_: int) -> tuple[float, float]:
    """Tokens per second of all clients together, p95 of the seconds to a first token."""
    timeout = aiohttp.ClientTimeout(total=3600)
    # A new connection each time: llama-server closes a kept one while the next question comes.
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)
    ) as session:

        async def client(number: int) -> list[tuple[int, float]]:
            texts = [prompt(f"{scenario} {round_} {number} {i}", scenario) for i in range(scenario.requests)]
            return [await ask(session, url, model, text, scenario.tokens) for text in texts]

        began = time.perf_counter()
        found = [one for many in await asyncio.gather(*map(client, range(scenario.clients))) for one in many]
        seconds = time.perf_counter() - began
    firsts = [first for _, first in found]
    p95 = statistics.quantiles(firsts, n=20, method="inclusive")[-1] if len(firsts) > 1 else firsts[0]
    return sum(count for count, _ in found) / seconds, p95


def measure(server: Server, scenario: Scenario, round_: int) -> Figures:
    """A fresh server in one scenario, warmed by one short question."""
    with serving(server, scenario) as (url, process):
        asyncio.run(drive(url, server.model, Scenario(1, 0, 1, 4, 4), round_))
        tps, first = asyncio.run(drive(url, server.model, scenario, round_))
        status = Path(f"/proc/{process}/status")
        peak = 0
        if status.exists():
            peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return Figures(tps, first, peak / 1e6)


def rows_of(scenario: Scenario, found: dict[str, list[Figures]]) -> Iterator[list[str]]:
    """A row for each server; ratios are above 1 where the first is ahead of it."""
    ours = next(iter(found.values()))
    for name, theirs in found.items():
        row = [str(scenario.clients), "yes" if scenario.shared else "no", name]
        row.append(spread([f.tps for f in theirs], 1))
        row.append(spread([a.tps / b.tps for a, b in zip(ours, theirs, strict=True)], 2, "×"))
        row.append(spread([f.first for f in theirs], 2, " s"))
        row.append(spread([b.first / a.first for a, b in zip(ours, theirs, strict=True)], 2, "×"))
        yield [*row, f"{max(f.memory for f in theirs):.2f} GB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, help="default: m7mlx, mlx-lm, llama.cpp if it is there"
    )
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), metavar="PROGRAM")
    parser.add_argument("--llama-python", metavar="PYTHON")
    parser.add_argument("--float32", action="store_true", help="weights expanded to float32")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=150, metavar="WORDS")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", choices=("own", "shared"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        servers = find_servers(args, Path(scratch))
        rows: list[list[str]] = []
        for shared in (0, 512):
            if args.only and (args.only == "shared") != bool(shared):
                continue
            for clients in args.clients:
                scenario = Scenario(clients, shared, args.requests, args.prompt, args.tokens)
                found: dict[str, list[Figures]] = {server.name: [] for server in servers}
                for round_ in range(args.rounds):
                    for server in servers:
                        figures = measure(server, scenario, round_)
                        found[server.name].append(figures)
                        print(f"{clients} clients, {shared} shared, {server.name}: {figures}", file=sys.stderr)
                rows += rows_of(scenario, found)
    print(machine_line())
    head = ["clients", "shared start", "server", "tok/s", f"{servers[0].name} ahead"]
    table([*head, "p95 to first", f"{servers[0].name} ahead", "memory"], rows)


if __name__ == "__main__":
    main()
