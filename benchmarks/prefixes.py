"""Time to the first token of a long prompt: read anew, held in memory, and back from the disk.

    python benchmarks/prefixes.py --model demo --tokens 4000

The server is ended and started again between the second and the third.
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

import httpx

KEY = "a-key-of-the-benchmark"  # so that it is told how much of a prompt was held
WORDS = "The model reads the same long instructions of an agent at each start of the day. "


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, a Hub repository or an alias (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4000, help="of the prompt, about (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="whose median is told (%(default)s)")
    args = parser.parse_args()
    times: dict[str, list[float]] = {"read anew": [], "in memory": [], "from the disk": []}
    nbytes = held = length = 0
    with tempfile.TemporaryDirectory() as scratch:
        key = Path(scratch) / "key"
        key.write_text(KEY)
        for number in range(args.rounds):
            folder = Path(scratch) / str(number)
            options = ["--api-key-file", str(key), "--prefix-dir", str(folder), "--prefix-disk", "8"]
            prompt = f"Round {number}. " + WORDS * (args.tokens // 16)
            with _serving(args.model, options) as url:
                _ask(url, "Hi")  # what the first request of all costs besides
                times["read anew"].append(_ask(url, prompt)[0])
                times["in memory"].append(_ask(url, prompt)[0])
            nbytes = sum(file.stat().st_size for file in folder.iterdir())
            with _serving(args.model, options) as url:
                _ask(url, "Hi")
                seconds, held, length = _ask(url, prompt)
                times["from the disk"].append(seconds)
    print(f"{args.model}: a prompt of {length:,} tokens, {held:,} of them held; {nbytes / 1e6:,.0f} MB on disk")
    for name, found in times.items():
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"  {name:14} {statistics.median(found):7.2f} s to the first token ({spread})")


def _ask(url: str, text: str) -> tuple[float, int, int]:
    """Seconds to the first token, tokens of the prompt that were held, and all of them."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun, first, told = time.perf_counter(), 0.0, ""
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=600
    ) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            first = first or time.perf_counter() - begun
            told += line
    held, length = re.search(r'"cached_tokens": (\d+)', told), re.search(r'"prompt_tokens": (\d+)', told)
    assert held and length, told
    return first, int(held[1]), int(length[1])


@contextmanager
def _serving(model: str, options: list[str]) -> Iterator[str]:
    command = [sys.executable, "-m", "m7mlx_serve", "--model", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        for line in process.stderr:
            if found := re.search(r"http://\S+", line):
                yield found[0]
                break
        else:
            raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.stderr.close()
        process.wait(60)


if __name__ == "__main__":
    main()
