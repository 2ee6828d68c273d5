"""Answers that a scheduler drafts for, against those of one that does not: tokens per second.

    python benchmarks/drafts.py [--model demo] [--tokens 100] [--rounds 3] [--drafted 2]

The tokens are the same, which each run checks: where they are not, the model's logits of both are
looked at, which may differ by rounding alone. "copy" repeats what the prompt says, "free" does
not; "predicted" is a free answer whose request has a prediction, the answer with some words
changed. As in a server that has run for a while, a scheduler goes through all rounds of a row, and
has learned in one before them what passes cost.
"""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
import argparse
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
from common import machine_line, spread, table
from speculative import JSON, TEXT

from m7mlx import Mistral, Request, Tokenizer, load
from m7mlx.scheduler import Scheduler

COPIES = (
    f"Repeat the following text word for word.\n\n{TEXT}",
    f"Repeat this JSON exactly.\n\n{JSON}",
    f"Repeat the following text word for word.\n\n{TEXT[600:]}",
    f"Repeat this JSON twice.\n\n{JSON}",
)
FREE = ("Write a story about a fox.", "Explain how rivers form.", "Write a letter to a friend.", "What is a ship?")
SCENARIOS = (
    ("free",),
    ("copy",),
    ("predicted",),
    ("free", "free"),
    ("copy", "free"),
    ("copy", "copy"),
    ("free",) * 4,
    ("copy", "copy", "free", "free"),
)


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drafted", type=int, default=2)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    rows = []
    for kinds in SCENARIOS:
        requests = asked(model, tokenizer, kinds, args.tokens)
        plain, drafted = list[list[float]](), list[list[float]]()
        ids: list[list[int]] = []
        one, other = (Scheduler(model, tokenizer, rows=len(requests), kept=0, drafted=n) for n in (0, args.drafted))
        for round_ in range(args.rounds + 1):
            speeds_now = [speeds(model, requests, scheduler, ids) for scheduler in (one, other)]
            if round_:
                plain.append(speeds_now[0])
                drafted.append(speeds_now[1])
        for kind in dict.fromkeys(kinds):
            which = [i for i, one in enumerate(kinds) if one == kind]
            before, after = ([sum(each[i] for i in which) for each in found] for found in (plain, drafted))
            ratios = [a / b for a, b in zip(after, before, strict=True)]
            others = " + ".join(kinds)
            rows.append([others, kind, spread(before, 1), spread(after, 1), spread(ratios, 2, "×")])
    print(machine_line(), f"· {args.model} · greedy · {args.rounds} rounds · {args.drafted} drafted for at a time")
    table(["answers at a time", "of these", "plain, tok/s", "with drafts, tok/s", "times as fast"], rows)


def asked(model: Mistral, tokenizer: Tokenizer, kinds: tuple[str, ...], tokens: int) -> list[Request]:
    """The requests of a scenario."""
    found = []
    for i, kind in enumerate(kinds):
        text = COPIES[i] if kind == "copy" else FREE[i]
        ids = tokenizer.chat.encode([{"role": "user", "content": text}])
        request = Request(ids, max_tokens=tokens, logit_bias=dict.fromkeys(tokenizer.eos_ids, -100.0))
        if kind == "predicted":
            answer: list[list[int]] = []
            speeds(model, [request], Scheduler(model, tokenizer, kept=0), answer)
            changed = [token if at % 25 else tokenizer.encode(" else")[-1] for at, token in enumerate(answer[0], 1)]
            request = replace(request, prediction=changed)
        found.append(request)
    return found


def speeds(
    model: Mistral,
    requests: list[Request],
    scheduler: Scheduler,
    expected: list[list[int]],
) -> list[float]:
    """Tokens per second of each answer, from the moment when all prompts have been read.

    They must be those in `expected`, which the first call fills.
    """
    numbers = [scheduler.add(request) for request in requests]
    ids: dict[int, list[int]] = {number: [] for number in numbers}
    ended: dict[int, float] = {}
    begun, more = 0.0, True
    while more:
        told, more = scheduler.step()
        for number, piece in told:
            ids[number] += piece.ids
            if piece.finish_reason is not None:
                ended[number] = time.perf_counter()
        if not begun and all(ids.values()):
            begun, before = time.perf_counter(), {number: len(found) for number, found in ids.items()}
    found = [ids[number] for number in numbers]
    expected[:] = expected or found
    for request, one, other in zip(requests, found, expected, strict=True):
        check_same(model, request, one, other)
    return [(len(ids[number]) - before[number]) / (ended[number] - begun) for number in numbers]


def check_same(model: Mistral, request: Request, one: list[int], other: list[int]) -> None:
    """Check that two answers are the same up to a near tie."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    if at is not None:
        logits = model(mx.array([[*request.ids, *one[:at]]]))[0, -1]
        gap = float(np.array(mx.abs(logits[one[at]] - logits[other[at]])))
        print(f"a near tie of {gap:.4f} fell the other way after {at} tokens", flush=True)
        if gap > 0.05:
            raise SystemExit("the tokens differ from plain decoding")


if __name__ == "__main__":
    main()
