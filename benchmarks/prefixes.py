"""Time to the first token of a long prompt: read anew, held in memory, and back from the disk.

    python benchmarks/prefixes.py --model demo --tokens 4000

The server is ended and started again between the second and the third. Beside the seconds on the
clock stand those of the processor, which count where other work runs on the machine.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

KEY = "a-key-of-the-benchmark"  # so that it is told how much of a prompt was held
WORDS = "The model reads the same long instructions of an agent at each start of the day. "


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, a Hub repository or an alias (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4000, help="of the prompt, about (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="whose median is told (%(default)s)")
    args = parser.parse_args()
    times: dict[str, list[Asked]] = {"read anew": [], "in memory": [], "from the disk": []}
    nbytes = 0
    with tempfile.TemporaryDirectory() as scratch:
        key = Path(scratch) / "key"
        key.write_text(KEY)
        for number in range(args.rounds):
            folder = Path(scratch) / str(number)
            options = ["--api-key-file", str(key), "--prefix-dir", str(folder), "--prefix-disk", "8"]
            prompt = f"Round {number}. " + WORDS * (args.tokens // 16)
            with _serving(args.model, options) as server:
                _ask(server, "Hi")  # what the first request of all costs besides
                times["read anew"].append(_ask(server, prompt))
                times["in memory"].append(_ask(server, prompt))
            nbytes = sum(file.stat().st_size for file in folder.iterdir())
            with _serving(args.model, options) as server:
                _ask(server, "Hi")
                times["from the disk"].append(_ask(server, prompt))
    last = times["from the disk"][-1]
    print(f"{args.model}: a prompt of {last.length:,} tokens, {last.held:,} held; {nbytes / 1e6:,.0f} MB on disk")
    print("  to the first token:")
    for name, found in times.items():
        clock, cpu = [one.seconds for one in found], [one.processor for one in found]
        print(
            f"  {name:14} {statistics.median(clock):7.2f} s ({min(clock):.2f} to {max(clock):.2f}), "
            f"{statistics.median(cpu):.2f} s ({min(cpu):.2f} to {max(cpu):.2f}) of the processor"
        )


class Asked(NamedTuple):
    """What a question cost: seconds to the first token, on the clock and of the processor.

    held    tokens of the prompt that were held; length, all of them
    """

    seconds: float
    processor: float
    held: int
    length: int


class Server(NamedTuple):
    """A server's address and its process."""

    url: str
    process: psutil.Process


def _ask(server: Server, text: str) -> Asked:
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    url, begun, first, told = server.url, time.perf_counter(), 0.0, ""
    used, processor = sum(server.process.cpu_times()[:2]), 0.0
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=600
    ) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not first:
                first = time.perf_counter() - begun
                processor = sum(server.process.cpu_times()[:2]) - used
            told += line
    held, length = re.search(r'"cached_tokens": (\d+)', told), re.search(r'"prompt_tokens": (\d+)', told)
    assert held and length, told
    return Asked(first, processor, int(held[1]), int(length[1]))


@contextmanager
def _serving(model: str, options: list[str]) -> Iterator[Server]:
    command = [sys.executable, "-m", "m7mlx_serve", "--model", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        for line in process.stderr:
            if found := re.search(r"http://\S+", line):
                yield Server(found[0], psutil.Process(process.pid))
                break
        else:
            raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.stderr.close()
        process.wait(60)


if __name__ == "__main__":
    main()
