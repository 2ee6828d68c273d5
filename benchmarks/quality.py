"""The price of fewer bits for keys and values, and the use of sinks, on real text.

    python benchmarks/quality.py [--model demo] [--tokens 2048] [--max-kv-size 512]

The text is Python's own reference documentation, which every Python brings. Perplexity is that of
the text; KL divergence is of each next-token distribution from that with unquantised keys and
values, in nats; top-1 says how often the most probable token is the same.
"""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
import argparse
import math
from pydoc_data.topics import topics

import numpy as np
from common import machine_line, table

from m7mlx import Mistral, load
from m7mlx.decode import decode, prefill
from m7mlx.sampling import Sampler, Sampling
from m7mlx.scoring import compare, score

CHUNK = 128
STORY = Sampling(temperature=0.9, top_k=40, repetition_penalty=1.1, repetition_context=256, seed=1)


def perplexity(logprobs: np.ndarray) -> float:
    return math.exp(-logprobs.mean())


def in_fewer_bits(model: Mistral, ids: list[int]) -> None:
    rows = []
    for bits in (32, 16, 8, 4):
        cache = model.new_cache(kv_bits=bits)
        found = compare(model, model, ids, caches=(cache, model.new_cache(kv_bits=32)))
        per_number = cache.nbytes / 2 / model.config.n_layers / model.config.n_kv_heads / model.config.head_dim
        per_number *= 8 / cache.rings[0].n_slots
        name = "as computed" if bits == 32 else f"{bits} bits"
        loss, kl, same = perplexity(found.logprobs), found.kl.mean(), found.agrees.mean()
        rows.append([name, f"{per_number:.2f}", f"{loss:.3f}", f"{kl:.5f}", f"{same:.1%}"])
    table(["keys and values", "bits a number", "perplexity", "KL", "top-1"], rows)


def streaming(model: Mistral, ids: list[int], size: int) -> None:
    """Measure perplexity in a bounded stream, with sinks and without, by quarters of the text."""
    part = len(ids) // 4
    rows = []
    for sinks in (4, 0):
        loss = score(model, ids, cache=model.new_cache(max_kv_size=size, sinks=sinks)).logprobs
        head = perplexity(loss[: size - CHUNK])
        rows.append(
            [f"{sinks} sinks", f"{head:.2f}", *(f"{perplexity(loss[i * part :][:part]):.2f}" for i in range(4))]
        )
    table(["perplexity", f"first {size - CHUNK}", *(f"quarter {i + 1}" for i in range(4))], rows)


def fluency(model: Mistral, ids: list[int], size: int, count: int) -> list[int]:
    """Tokens generated in a bounded stream, sampled as one would for a story."""
    cache = model.new_cache(max_kv_size=size)
    logits = prefill(model, ids, cache)
    return list(decode(model, logits, cache, Sampler(STORY), count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--max-kv-size", type=int, default=512)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    print(machine_line(), f"· {args.model} · {args.tokens} tokens\n")
    text = "\n".join(topics[name] for name in sorted(topics))
    size = args.max_kv_size
    ids = tokenizer.encode(text[: 20 * size * 8])[: max(args.tokens, 20 * size)]
    in_fewer_bits(model, ids[: args.tokens])
    print(
        f"\nmax_kv_size {size}, {20 * size:,} tokens of text (the model's context is "
        f"{model.config.max_position_embeddings:,}):\n"
    )
    streaming(model, ids[: 20 * size], size)
    prompt = tokenizer.encode("The lighthouse keeper had not spoken to anyone for three weeks when the storm began.")
    answer = fluency(model, prompt, size, 20 * size)
    tail = tokenizer.decode(answer[-120:])
    distinct = len({tuple(answer[i : i + 4]) for i in range(len(answer) - 2000, len(answer) - 4)}) / 1996
    print(
        f"\nGenerated {len(answer):,} tokens; of the last 2,000, {distinct:.0%} of the 4-grams are distinct. "
        f"The end:\n\n{tail}"
    )


if __name__ == "__main__":
    main()
