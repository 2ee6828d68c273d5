"""Decoding with prompt lookup, and with a draft model, against plain decoding: the same tokens, in what time?

python benchmarks/speculative.py [--model demo] [--draft NAME] [--tokens 200] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

from common import alternate, machine, preload_blas, spread, table

blas = preload_blas()

import textwrap  # noqa: E402
from pydoc_data.topics import topics  # noqa: E402  (English prose that every Python brings)

from m7mlx import Mistral, PromptLookup, Tokenizer, load, load_draft_model  # noqa: E402
from m7mlx.decode import decode, prefill  # noqa: E402
from m7mlx.sampling import Sampler, Sampling  # noqa: E402
from m7mlx.speculative import DRAFT_SLACK, Drafter, speculate  # noqa: E402

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
JSON = json.dumps(
    [{"id": i, "name": f"sensor-{i}", "unit": "celsius", "values": [i, i + 1, i + 2]} for i in range(6)], indent=1
).replace("],\n", "]\n", 1)
PROMPTS = {
    "quote": ("copy", f"Repeat the following text word for word.\n\n{TEXT}"),
    "edit a file": ("copy", f"Rewrite this Python file with the class renamed to BankAccount.\n```python{CODE}```"),
    "repair JSON": ("copy", f"This JSON lacks a comma. Write the whole corrected JSON.\n```json\n{JSON}\n```"),
    "story": ("free", "Write a long story about a lighthouse keeper who finds a message in a bottle."),
    "explain": ("free", "Explain to a curious child how rainbows form, and why the sky is blue."),
    "letter": ("free", "Write a letter to a friend in which you describe a journey through the mountains."),
}


def seconds(
    model: Mistral, ids: list[int], count: int, answer: list[int], make: Callable[[], Drafter] | None
) -> float:
    """Seconds to decode `count` tokens after the prompt; they must be those in `answer`, which is filled first."""
    cache = model.new_cache(slack=DRAFT_SLACK)
    logits = prefill(model, ids, cache)
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
    print(machine(blas), f"· {args.model} · {args.tokens} greedy tokens · {args.rounds} rounds")
    ways: dict[str, Callable[[], Drafter]] = {"lookup": PromptLookup}
    if args.draft:
        draft = load_draft_model(args.draft, model, tokenizer)
        ways[f"draft {args.draft}"] = lambda: draft
    rows = []
    for name, (kind, prompt) in PROMPTS.items():
        rows.append(measure(model, tokenizer, name, kind, prompt, ways, args.tokens, args.rounds))
    table(["text", "kind", "plain, tok/s", *(f"{way}, times as fast" for way in ways)], rows)


def measure(
    model: Mistral,
    tokenizer: Tokenizer,
    name: str,
    kind: str,
    prompt: str,
    ways: dict[str, Callable[[], Drafter]],
    count: int,
    rounds: int,
) -> list[str]:
    ids = tokenizer.chat.encode([{"role": "user", "content": prompt}])
    answer: list[int] = []
    run = partial(seconds, model, ids, count, answer)
    runs = {"plain": partial(run, None)} | {way: partial(run, make) for way, make in ways.items()}
    found = alternate(rounds, runs)
    plain = found.pop("plain")
    ratios = [spread([p / t for p, t in zip(plain, times, strict=True)], "×") for times in found.values()]
    return [name, kind, spread([count / t for t in plain], digits=1), *ratios]


if __name__ == "__main__":
    main()
