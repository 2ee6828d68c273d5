"""A number told in a long text, and asked for at an exact distance: a part of `long_context.py`."""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
from collections.abc import Sequence

import mlx.core as mx

from m7mlx import Mistral, RollingCache, Tokenizer
from m7mlx.decode import prefill

INTRO = "There is an important number hidden in a long text. Find it and remember it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
ASKED = "\nWhat is the pass key? The pass key is "
CHUNK = 64  # tokens read at a time


def passkey_prompt(tokenizer: Tokenizer, key: str, lead: int, distance: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a text with `key` in it, after `lead` of filler, and of the question.

    The last token of the question, which the first digit is to follow, stands `distance` tokens
    after the last digit told. For other distances the text is the same, cut elsewhere.
    """
    asked = tokenizer.encode(ASKED)
    filler = tokenizer.encode(FILLER * ((lead + distance) // 16 + 1))
    told = tokenizer.encode(INTRO) + filler[:lead] + tokenizer.encode(f" The pass key is {key}")
    after = tokenizer.encode(". Remember it. ") + filler
    return told + after[: distance - len(asked)], asked


def digits_known(
    model: Mistral,
    asked: list[int],
    digits: list[int],
    cache: RollingCache,
) -> tuple[float, bool]:
    """Return the log probability of `digits`, in nats a digit, and whether decoding gives all.

    The cache is left as it was.
    """
    before = cache.snapshot()
    logits = model(mx.array([asked + digits[:-1]]), cache)[0, -len(digits) :]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    found = mx.take_along_axis(logprobs, mx.array(digits)[:, None], axis=-1).mean().item()
    greedy = mx.argmax(logits, axis=-1).tolist() == digits
    cache.restore(before)
    assert isinstance(found, float)
    return found, greedy


def told_and_asked(
    model: Mistral,
    tokenizer: Tokenizer,
    keys: Sequence[str],
    lead: int,
    distances: Sequence[int],
    cache: RollingCache,
) -> list[list[tuple[float, bool]]]:  # [distances][keys]
    """The first of `keys` told, and each of `keys` scored as the answer, at growing distances."""
    found = []
    for distance in distances:
        text, asked = passkey_prompt(tokenizer, keys[0], lead, distance)
        prefill(model, text[cache.offset :], cache, CHUNK)
        found.append([digits_known(model, asked, tokenizer.encode(key), cache) for key in keys])
    return found
