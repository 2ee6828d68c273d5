"""The sliding window far into a text: what it costs, what it reaches, that it stays flat.

    python benchmarks/long_context.py [perplexity] [passkey] [reach] [cost] [--json long.json]
        [--plot long.png]

Without a name all four run, which takes an hour or more on two cores. With --json each adds its
figures to those that the file holds already, so that they can run one by one; --plot draws what
there is.

perplexity  of Python's reference documentation by position, to 32 windows: the demo model with a
            window put on it, with a bounded stream and sinks, and with full attention, to 1.5
            times the trained context. Each text is also scored by full attention with W to 2 W
            tokens before every token, wherever it stands: the ratio to that is what position does,
            since each text's difficulty cancels token by token.
passkey     a number told, then asked for after a distance of W / 8 to 8 W tokens. The margin is
            how much more probable the right digits are than after the same text with another
            number in it, in nats a digit: 0 where nothing of the number is left in the logits,
            whatever digits the model prefers.
reach       how much the last logits move when one token is changed, by its distance, in a random
            model and in the demo model: through k layers a window of W reaches k · (W − 1)
            positions back, and none further.
cost        milliseconds per token and memory by position to 131,072, all of them read, against
            mlx-lm as shipped, on the small model of m7mlx-bench (random weights, window 1,024).

The demo model was trained with full attention. Mistral 7B v0.1 was trained with its window, and
loses nothing by it.
"""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
import argparse
import json
import math
import multiprocessing
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import mlx.core as mx
from common import machine_line, spread, table
from long_context_cost import ENGINES, measure
from long_context_passkey import told_and_asked
from long_context_plots import plot
from long_context_reach import TOY, moved, random_model
from m7mlx_bench.models import SMALL, write_random

from m7mlx import Mistral, RollingCache, Tokenizer, load

CHUNK = 64  # tokens read at a time: of 16 … 256 the fastest with 8,192 keys
Caches = dict[str, Callable[[], RollingCache]]
Keep = Callable[[dict[str, Any]], None]  # stores what a part has found so far


def caches(model: Mistral, window: int) -> Caches:
    """The three ways to read on: one model, since only the cache knows of a window."""
    windowed = replace(model.config, sliding_window=window)
    return {
        "window": partial(RollingCache, windowed),
        "4 sinks": partial(RollingCache, model.config, max_kv_size=window),
        "full": partial(RollingCache, model.config),
    }


# --- perplexity by position -------------------------------------------------------------------


def losses(model: Mistral, ids: Sequence[int], cache: RollingCache, skip: int = 0) -> list[float]:
    """Return −log probability of ids[skip + 1 :] in nats, each after all before it."""
    found: list[float] = []
    for start in range(0, len(ids) - 1, CHUNK):
        end = min(start + CHUNK, len(ids) - 1)
        hidden = model.hidden(mx.array([ids[start:end]]), cache)
        if end > skip:
            first = max(skip - start, 0)
            logits = model.head(hidden[:, first:])[0]
            picked = mx.take_along_axis(logits, mx.array(list(ids[start + first + 1 : end + 1]))[:, None], axis=-1)[
                :, 0
            ]
            values: list[float] = (mx.logsumexp(logits, axis=-1) - picked).tolist()  # type: ignore[assignment]
            found += values
        mx.eval(hidden, *cache.arrays)
        mx.clear_cache()
    return found


def fresh_losses(model: Mistral, ids: Sequence[int], window: int) -> list[float]:
    """Return −log probability of ids[window:], each after `window` to 2 · `window` − 1 tokens."""
    found: list[float] = []
    for start in range(window, len(ids), window):
        piece = ids[start - window : start + window]
        found += losses(model, piece, RollingCache(model.config), skip=window - 1)
    return found


def by_bucket(values: Sequence[float], size: int) -> list[float]:
    """Means of `size` values at a time."""
    return [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]


def perplexity(args: argparse.Namespace, keep: Keep) -> None:
    """Mean losses in nats by bucket of one window, of each way and each text."""
    model, tokenizer = demo()
    window, length, context = args.window, args.windows * args.window, model.config.max_position_embeddings
    ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    # Each text has a window of others before it, for the fresh reading.
    starts = [window + i * (len(ids) - length - window) // max(args.texts - 1, 1) for i in range(args.texts)]
    runs: dict[str, list[list[float]]] = {}
    for start in starts:
        ways = caches(model, window)
        if start != starts[0]:
            # In quadratic time, one text must do, and 1.5 times the trained context.
            del ways["full"]
        for name in ("fresh", *ways):
            if name == "fresh":
                values = fresh_losses(model, ids[start - window : start + length], window)
            else:  # the token before the text makes its first one count
                end = min(length, context * 3 // 2) if name == "full" else length
                values = losses(model, ids[start - 1 : start + end], ways[name]())
            runs.setdefault(name, []).append(by_bucket(values, window))
            print(f"text at {start:,}, {name}: perplexity {math.exp(statistics.fmean(values)):.2f}", flush=True)
            keep({"window": window, "context": context, "starts": starts, "runs": runs})
    show_perplexity(runs)


def ratios(fresh: list[list[float]], found: list[list[float]], first: int = 0, end: int | None = None) -> list[float]:
    """Return perplexity over that of a fresh reading, in the windows first … end − 1, by text.

    As far as the text was read; nothing for a text that was not read so far.
    """
    pairs = [(a[first:end], b[first:end]) for a, b in zip(found, fresh, strict=False) if len(a) > first]
    return [math.exp(statistics.fmean(a) - statistics.fmean(b[: len(a)])) for a, b in pairs]


def show_perplexity(runs: dict[str, list[list[float]]]) -> None:
    """The ratios by spans of windows that double; and perplexity itself, of all that was read."""
    windows = len(runs["fresh"][0])
    edges = [0, *(1 << n for n in range(windows.bit_length())), windows]
    spans = [(a, b) for a, b in pairwise(edges) if a < b]
    rows = []
    for name, found in runs.items():
        cells = [ratios(runs["fresh"], found, a, b) for a, b in spans]
        own = [math.exp(statistics.fmean(losses)) for losses in found]
        rows.append([name, *(spread(cell, 2) if cell else "–" for cell in cells), spread(own, 2)])
    table(["window", *(f"{b}" if b - a == 1 else f"{a + 1}–{b}" for a, b in spans), "perplexity"], rows)


# --- passkey ----------------------------------------------------------------------------------

# Distances in windows.
PLACES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 15 / 16, 17 / 16, 5 / 4, 3 / 2, 2, 3, 4, 6, 8)


def passkey(args: argparse.Namespace, keep: Keep) -> None:
    """Measure by distance and way how often greedy decoding gives the number, and its margin."""
    model, tokenizer = demo()
    window = args.window
    distances = [int(place * window) for place in PLACES]
    keys = [str(key) for key in random.Random(1).sample(range(10000, 100000), args.keys)]
    leads = [32, window]
    runs: dict[str, dict[str, list[list[float]]]] = {
        name: {"greedy": [[] for _ in distances], "margins": [[] for _ in distances]}
        for name in caches(model, window)
    }
    pairs = [(key, keys[(i + 1) % len(keys)]) for i, key in enumerate(keys)]
    for lead in leads:
        for name, cache in caches(model, window).items():
            told = [told_and_asked(model, tokenizer, pair, lead, distances, cache()) for pair in pairs]
            for at in range(len(distances)):
                for i in range(len(keys)):
                    (own, right), (rival, _) = told[i][at][0], told[i - 1][at][1]
                    runs[name]["greedy"][at].append(right)
                    # The same digits, after this number and after the one before it.
                    runs[name]["margins"][at].append(own - rival)
            print(f"{name}, {lead} tokens before the number", flush=True)
            keep({"window": window, "keys": keys, "leads": leads, "distances": distances, "runs": runs})
    show_passkey(runs, distances)


def show_passkey(runs: dict[str, dict[str, list[list[float]]]], distances: Sequence[int]) -> None:
    rows = []
    for at, distance in enumerate(distances):
        cells = []
        for run in runs.values():
            right, margins = run["greedy"][at], run["margins"][at]
            cells.append(f"{sum(right):.0f} of {len(right)}, {statistics.fmean(margins):.3g}")
        rows.append([f"{distance:,}", *cells])
    table(["distance", *(f"{name}: right, margin" for name in runs)], rows)


# --- reach ------------------------------------------------------------------------------------

TOY_WINDOW = 64
DEMO_WINDOW = 32  # its 30 layers reach 930 positions


def reach(args: argparse.Namespace, keep: Keep) -> None:
    """The change of the last logits by distance, to two windows beyond the last layer's."""
    model, tokenizer = demo()
    text = tokenizer.encode(topics["compound"])
    runs = {}
    for kind, one, window, every in (
        ("random", random_model(TOY), TOY_WINDOW, 1),
        ("demo model", model, DEMO_WINDOW, 3 * (DEMO_WINDOW - 1)),
    ):
        n_layers = one.config.n_layers
        name = f"{kind}, {n_layers} layers"
        end = n_layers * (window - 1)
        distances = sorted({*range(every, end + 2 * window, every), end, end + 1})
        ids = [token % one.config.vocab_size for token in text[: end + 3 * window]]
        changes = moved(one, ids, window, distances)
        runs[name] = {"window": window, "layers": n_layers, "distances": distances, "changes": changes}
        keep(runs)
        within = min(c for d, c in zip(distances, changes, strict=True) if d <= end)
        beyond = max(c for d, c in zip(distances, changes, strict=True) if d > end)
        print(
            f"{name}, window {window}: reach {end:,}; least change within it {within:.2g}, greatest beyond {beyond:g}"
        )


# --- time and memory --------------------------------------------------------------------------


def cost(args: argparse.Namespace, keep: Keep) -> None:
    """Each engine in a process of its own; mlx-lm, which reads in quadratic time, to --peer-end."""
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), SMALL)
        for engine in ENGINES:
            end = args.end if engine == "m7mlx" else min(args.end, args.peer_end)
            positions = [1 << n for n in range(10, end.bit_length())]
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                runs[engine] = pool.submit(measure, engine, Path(folder), positions, args.tokens).result()
            keep({"window": SMALL.sliding_window, "tokens": args.tokens, "runs": runs})
    head = [
        "engine",
        "position",
        "prefill, tok/s",
        "ms per token",
        "keys and values, MB",
        "MLX's peak, MB",
        "RSS, MB",
    ]
    rows = [
        [engine, f"{row['position']:,}", f"{row['prefill']:,.0f}", f"{row['ms']:.2f}"]
        + [f"{row[key] / 1e6:,.{digits}f}" for key, digits in (("kv", 2), ("peak", 0), ("rss", 0))]
        for engine, found in runs.items()
        for row in found
    ]
    table(head, rows)


@lru_cache
def demo() -> tuple[Mistral, Tokenizer]:
    return load("demo")


PARTS = {"perplexity": perplexity, "passkey": passkey, "reach": reach, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--window", type=int, default=512, help="put on the demo model")
    parser.add_argument("--windows", type=int, default=32, help="length of each text")
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--keys", type=int, default=4, help="numbers told, each at two depths")
    parser.add_argument("--end", type=int, default=1 << 17, help="last position of `cost`")
    parser.add_argument("--peer-end", type=int, default=1 << 15, help="the same for mlx-lm")
    parser.add_argument("--tokens", type=int, default=32, help="decoded at each position")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.window < 128:
        parser.error("--window must be at least 128: an eighth of it has to hold the question")
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    print(machine_line(), flush=True)

    def keep(name: str, figures: dict[str, Any]) -> None:
        results[name] = figures
        if args.json:
            args.json.write_text(json.dumps(results))

    for name in args.parts or ([] if results and args.plot else PARTS):
        PARTS[name](args, partial(keep, name))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
