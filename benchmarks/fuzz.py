"""Whatever strangers may send, for minutes, against m7mlx-serve.

It must answer /health within 0.1 s, lose nothing and keep nothing.

    python benchmarks/fuzz.py [--model FOLDER] [--clients 8] [--minutes 3] [--seed 0]
        [--latency 0.1]

Without --model it is a small one with random weights and a window of 16. Clients send mutated
bodies, schemas and headers, bodies of megabytes, chunks of one byte; they leave in the middle,
dribble, do not read, close one half, and come in crowds. Beside them one asks properly, and a
process of its own watches /health. It is a failure (exit status 1) if /health takes longer than
--latency, a proper request is not answered, a 5xx other than 503 comes, memory grows, or a request
or a file stays open. The bound of latency is for a machine that has little else to do, and two
cores. Everything stays on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fuzz_client import KINDS, SECONDS, Client, Tally
from tried_server import serving, settled, small_model


async def fuzz(url: str, clients: int, seconds: float, seed: int = 0) -> Tally:
    """All clients until the time is over."""
    tally, until = Tally(), time.monotonic() + seconds
    host, _, port = url.removeprefix("http://").partition(":")

    async def client(number: int) -> None:
        one = Client(host, int(port), random.Random(f"{seed} {number}"))
        while time.monotonic() < until:
            kind = Client.proper if not number else one.draw.choice(KINDS)
            status, name = 0, getattr(kind, "__name__", "")
            try:
                async with asyncio.timeout(SECONDS if number else 60):
                    status = await kind(one)
            except (OSError, TimeoutError):
                status = 0
            tally.ended[name, status] += 1
            if status >= 500 and status != 503:
                tally.wrong.append(f"{name}: {status}")
            if not number and status not in (200, 429, 503):
                tally.wrong.append(f"a proper request was answered with {status or 'nothing'}")

    await asyncio.gather(*map(client, range(clients)))
    return tally


def watch(url: str) -> None:
    """Ask for /health until the standard input ends, on a kept connection and on new ones.

    Prints how long it took.
    """
    host, _, port = url.removeprefix("http://").partition(":")
    os.set_blocking(sys.stdin.fileno(), False)
    kept, times, lost = http.client.HTTPConnection(host, int(port), timeout=30), list[float](), 0
    while not _ended(sys.stdin.fileno()):
        for connection in (kept, http.client.HTTPConnection(host, int(port), timeout=30)):
            began = time.perf_counter()
            try:
                connection.request("GET", "/health")
                lost += connection.getresponse().read() != b'{"status":"ok"}'
            except (OSError, http.client.HTTPException):
                lost += 1
            times.append(time.perf_counter() - began)
            if connection is not kept:
                connection.close()
        time.sleep(0.02)
    times.sort()
    print(json.dumps({"most": times[-1], "p99": times[len(times) * 99 // 100], "asked": len(times), "lost": lost}))


def _ended(descriptor: int) -> bool:
    try:
        return not os.read(descriptor, 1)
    except BlockingIOError:
        return False


@contextlib.contextmanager
def watching(url: str, found: dict[str, float]) -> Any:
    """Run `watch` meanwhile, in a process that has nothing else to do."""
    watcher = subprocess.Popen(
        [sys.executable, __file__, "--watch", url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield
    finally:
        out, _ = watcher.communicate(timeout=60)
        found |= json.loads(out)


def memory(process: int) -> float:
    """Resident, in MB."""
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(process)])) / 1e3


def open_files(process: int) -> int:
    """Return the files that a process has open; 0 where the system does not tell."""
    folder = Path(f"/proc/{process}/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


async def _sizes(process: int, sizes: list[float]) -> None:
    while True:
        sizes.append(await asyncio.to_thread(memory, process))
        await asyncio.sleep(1)


async def _run(url: str, process: int, args: argparse.Namespace) -> list[str]:
    """Return what is wrong."""
    await fuzz(url, args.clients, args.minutes * 6, args.seed + 1)  # until memory is what it is
    await settled(url)
    files, sizes, health = open_files(process), list[float](), dict[str, float]()
    sizing = asyncio.create_task(_sizes(process, sizes))
    with watching(url, health):
        tally = await fuzz(url, args.clients, args.minutes * 60, args.seed)
    sizing.cancel()
    left = await settled(url)
    await asyncio.sleep(2)
    third = max(1, len(sizes) // 3)
    first, last = statistics.median(sizes[:third]), statistics.median(sizes[-third:])
    by_kind: dict[str, dict[int, int]] = {}
    for (kind, status), count in sorted(tally.ended.items()):
        by_kind.setdefault(kind, {})[status] = count
    for kind, statuses in by_kind.items():
        print(f"{kind:10}", ", ".join(f"{status or 'none'} × {count}" for status, count in statuses.items()))
    print(f"/health, ms: p99 {health['p99'] * 1e3:.0f}, most {health['most'] * 1e3:.0f}, of {health['asked']:.0f}")
    print(f"resident memory, MB: first third {first:.0f}, last third {last:.0f}, most {max(sizes):.0f}")
    print(f"open at the end: {left:g} requests, {open_files(process)} files, {files} before")
    wrong = tally.wrong[:10]
    if health["most"] > args.latency:
        wrong.append(f"/health took {health['most'] * 1e3:.0f} ms")
    if health["lost"]:
        wrong.append(f"/health was not answered {health['lost']:.0f} times")
    if last > first * 1.2 + 50:
        wrong.append("memory grows")
    if left or open_files(process) > files + 8:
        wrong.append("something stays open")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="MODEL")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.1, metavar="S", help="the longest time for /health")
    parser.add_argument("--watch", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watch:
        watch(args.watch)
        return
    from m7mlx.files.hub import resolve

    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve(args.model) if args.model else small_model(Path(scratch))
        with serving(folder) as (url, process):
            wrong = asyncio.run(_run(url, process, args))
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
