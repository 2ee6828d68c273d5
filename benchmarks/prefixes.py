"""Time to the first token of a long prompt: read anew, held in memory, and back from the disk.

    python benchmarks/prefixes.py --model demo --tokens 4000

The server is ended and started again between the second and the third. Beside the seconds on the
clock stand those of the processor, which count where other work runs on the machine.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
from common import serving

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
            options = ["--model", args.model, "--api-key-file", str(key)]
            options += ["--prefix-dir", str(folder), "--prefix-disk", "8"]
            prompt = f"Round {number}. " + WORDS * (args.tokens // 16)
            with serving(*options) as server:
                _ask(server, "Hi")  # what the first request of all costs besides
                times["read anew"].append(_ask(server, prompt))
                times["in memory"].append(_ask(server, prompt))
            nbytes = sum(file.stat().st_size for file in folder.iterdir())
            with serving(*options) as server:
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


def _ask(server: tuple[str, int], text: str) -> Asked:
    url, process = server[0], psutil.Process(server[1])
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun, first, told = time.perf_counter(), 0.0, ""
    used, processor = sum(process.cpu_times()[:2]), 0.0
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=600
    ) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not first:
                first = time.perf_counter() - begun
                processor = sum(process.cpu_times()[:2]) - used
            told += line
    held, length = re.search(r'"cached_tokens": (\d+)', told), re.search(r'"prompt_tokens": (\d+)', told)
    assert held and length, told
    return Asked(first, processor, int(held[1]), int(length[1]))


if __name__ == "__main__":
    main()
