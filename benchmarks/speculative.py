"""Decoding with prompt lookup, and with a draft model, against plain decoding.

The tokens are the same; the time is compared.

python benchmarks/speculative.py [--model demo] [--draft NAME] [--tokens 200] [--rounds 5]
"""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
import argparse
import json
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics  # English prose that every Python brings
from typing import cast

import mlx.core as mx
from common import alternate, machine_line, spread, table

from m7mlx import Mistral, PromptLookup, RollingCache, load, load_draft_model
from m7mlx.decode import decode, prefill
from m7mlx.sampling import Sampler, Sampling
from m7mlx.speculative import DRAFT_SLACK, Drafter, speculate

TEXT = topics["compound"][:1400]
CODE = textwrap.dedent(
    """
    class Account:
        def __init__(self, owner, balance=0):
            self.owner = owner
            self.balance = balance

        def deposit(self, amount):
            if amount <= 0:
                raise ValueError("amount must be positive")
            self.balance += amount
            return self.balance

        def withdraw(self, amount):
            if amount > self.balance:
                raise ValueError("not enough money")
            self.balance -= amount
            return self.balance
    """
)
UNITS = {"celsius": 21.5, "kelvin": 300, "percent": 47, "volt": 3.3, "watt": 60}
JSON = json.dumps([{"id": f"sensor-{i}", "unit": u, "value": v} for i, (u, v) in enumerate(UNITS.items())], indent=1)

# Name → kind, question, and the answer that a good model gives (None: whatever comes).
TASKS: dict[str, tuple[str, str, str | None]] = {
    "quote": ("copy", f"Repeat the following text word for word.\n\n{TEXT}", TEXT),
    "edit a file": (
        "copy",
        f"Rewrite this Python file with the class renamed BankAccount, owner renamed holder.\n```python{CODE}```",
        f"```python{CODE.replace('Account', 'BankAccount').replace('owner', 'holder')}```",
    ),
    "repair JSON": (
        "copy",
        f"This JSON lacks commas. Write all of it, corrected.\n```json\n{JSON.replace('},', '}')}\n```",
        f"```json\n{JSON}\n```",
    ),
    "story": ("free", "Write a long story about a lighthouse keeper who finds a message in a bottle.", None),
    "explain": ("free", "Explain to a curious child how rainbows form, and why the sky is blue.", None),
    "letter": ("free", "Write a letter to a friend in which you describe a journey through the mountains.", None),
    "list": ("free", "Give me ten ideas for a birthday party, with a sentence on each.", None),
}


class Told:
    """A model made to give a certain answer, since a small one cannot edit a file."""

    def __init__(self, model: Mistral, prompt: int, answer: list[int]) -> None:
        self.model, self.prompt, self.answer = model, prompt, answer

    def __call__(self, ids: mx.array, cache: RollingCache) -> mx.array:
        logits = self.model(ids, cache)
        first = cache.offset - ids.shape[1] + 1 - self.prompt
        told = (self.answer[first : first + ids.shape[1]] + [0] * ids.shape[1])[: ids.shape[1]]
        return mx.put_along_axis(logits, mx.array(told)[None, :, None], mx.array(1e4), axis=-1)


def seconds(
    model: Mistral,
    ids: list[int],
    count: int,
    told: list[int],
    answer: list[int],
    make: Callable[[], Drafter] | None,
) -> float:
    """Measure the seconds to decode `count` tokens after the prompt.

    They must be those in `answer`, which the first call fills.
    """
    cache = model.new_cache(slack=DRAFT_SLACK)
    logits = prefill(model, ids, cache)
    if told:
        logits[0, told[0]] = 1e4
        model = cast(Mistral, Told(model, len(ids), told))
    sampler = Sampler(Sampling())
    started = time.perf_counter()
    if make is None:
        found = list(decode(model, logits, cache, sampler, count))
    else:
        found = list(speculate(model, logits, cache, sampler, count, make()))
    elapsed = time.perf_counter() - started
    answer[:] = answer or found
    if found != answer:
        raise SystemExit("the tokens differ from plain decoding")
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    print(machine_line(), f"· {args.model} · greedy · {args.rounds} rounds")
    ways: dict[str, Callable[[], Drafter]] = {"lookup": PromptLookup}
    if args.draft:
        draft = load_draft_model(args.draft, model, tokenizer)
        ways[f"draft {args.draft}"] = lambda: draft
    rows = []
    for name, (kind, question, right) in TASKS.items():
        ids = tokenizer.chat.encode([{"role": "user", "content": question}])
        rows.append([name, kind, *measure(model, ids, [], ways, args.tokens, args.rounds)])
        if right is not None:
            told = tokenizer.encode(right)
            rows.append([f"{name}, right", kind, *measure(model, ids, told, ways, len(told), args.rounds)])
    table(["text", "kind", "tokens", "plain, tok/s", *(f"{way}, times as fast" for way in ways)], rows)


def measure(
    model: Mistral,
    ids: list[int],
    told: list[int],
    ways: dict[str, Callable[[], Drafter]],
    count: int,
    rounds: int,
) -> list[str]:
    """Measure each way against plain decoding; return a row of the table."""
    run = partial(seconds, model, ids, count, told, [])
    runs: dict[str, Callable[[], float]] = {
        "plain": partial(run, None),
        **{way: partial(run, make) for way, make in ways.items()},
    }
    found = alternate(rounds, runs)
    plain = found.pop("plain")
    ratios = [spread([p / t for p, t in zip(plain, times, strict=True)], 2, "×") for times in found.values()]
    return [str(count), spread([count / t for t in plain], 1), *ratios]


if __name__ == "__main__":
    main()
