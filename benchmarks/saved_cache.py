"""Opening a saved conversation against reading it again.

    python benchmarks/saved_cache.py [--tokens 30000] [--rounds 3]

On the small Mistral-shaped model of m7mlx-bench (random weights), with a window of 4,096. Both
roads then decode 64 tokens, which must be the same.
"""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from common import alternate, machine_line, spread, table
from m7mlx_bench.models import SMALL

from m7mlx import Mistral, RollingCache, load_cache, save_cache
from m7mlx.decode import decode, prefill
from m7mlx.sampling import Sampler, Sampling


def go_on(model: Mistral, cache: RollingCache) -> list[int]:
    logits = model(mx.array([[7]]), cache)[:, -1]
    return list(decode(model, logits, cache, Sampler(Sampling()), 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = Mistral(replace(SMALL, sliding_window=4096))
    mx.eval(model.parameters())
    ids = [(i * i + 7 * i) % SMALL.vocab_size for i in range(args.tokens)]
    cache = model.new_cache()
    prefill(model, ids, cache)
    expected = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "conversation"

        def save() -> float:
            started = time.perf_counter()
            save_cache(path, cache, model)
            return time.perf_counter() - started

        def reopen() -> float:
            started = time.perf_counter()
            opened.append(load_cache(path, model))
            return time.perf_counter() - started

        def read_again() -> float:
            started = time.perf_counter()
            opened.append(model.new_cache())
            mx.eval(prefill(model, ids, opened[-1]))
            return time.perf_counter() - started

        opened: list[RollingCache] = []
        found = alternate(args.rounds, {"save": save, "open": reopen, "read again": read_again})
        size = path.stat().st_size
        answers = [go_on(model, one) for one in opened]
        expected = answers[0]
        if any(answer != expected for answer in answers):
            raise SystemExit("the tokens differ")
    ratios = [again / opening for again, opening in zip(found["read again"], found["open"], strict=True)]
    print(machine_line(), f"· {args.tokens:,} tokens · {args.rounds} rounds · file {size / 1e6:.1f} MB")
    head = ["save, s", "open, s", "read again, s", "times as fast"]
    times = [spread(found[name], 3) for name in ("save", "open", "read again")]
    table(head, [[*times, spread(ratios, 0, "×")]])


if __name__ == "__main__":
    main()
