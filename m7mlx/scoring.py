"""Log probabilities of given tokens, for perplexity, likelihoods and the distance of two models.

A text goes through a cache a chunk at a time. Logits of a few positions are held at once, and of
each only the numbers asked for are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from m7mlx.arrays import on_cpu
from m7mlx.cache import KVCache, RollingCache
from m7mlx.decode import default_chunk
from m7mlx.errors import InputError
from m7mlx.model import Mistral
from m7mlx.prompt import check_prompt

_POSITIONS = 128  # whose logits are held at one time: 25 MB in a vocabulary of 49,152


class Scores(NamedTuple):
    """How a model saw tokens that were given to it.

    logprobs  their log probabilities, natural, float32
    greedy    bool, whether each was the likeliest of all
    """

    logprobs: np.ndarray
    greedy: np.ndarray


class Comparison(NamedTuple):
    """Two models' predictions of the same tokens, by token; logarithms are natural.

    kl         KL(reference ‖ model): Σ p (log p − log q) over the vocabulary, p the reference's and
               q the model's
    agrees     bool, whether both find the same token the likeliest
    logprobs   of the token itself, by the model
    reference  … by the reference
    """

    kl: np.ndarray
    agrees: np.ndarray
    logprobs: np.ndarray
    reference: np.ndarray


class Span(NamedTuple):
    """A stretch of a text: ids[start : end − 1] are read to score ids[first : end]."""

    start: int
    first: int
    end: int


def spans(length: int, context: int | None = None, stride: int | None = None, first: int = 1) -> Iterator[Span]:
    """Yield spans that score each of ids[first:length] once and read at most `context` tokens.

    Each advances by `stride` tokens, so that what it scores has seen context − stride + 1 tokens at
    least; the first scores all it can. Without a context, one span holds everything.

        context 4, stride 2, length 9:   reads 0 1 2 3 … 5, scores
        span 1                                 0 1 2 3           1 2 3 4
        span 2                                     2 3 4 5       5 6
        span 3                                         4 5 6 7   7 8

    Raises InputError for a stride that is not between 1 and the context.
    """
    if context is None:
        context = max(1, length - 1)
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise InputError(f"the stride must lie between 1 and the context of {context}, not {stride}")
    while first < length:
        end = min(length, context + 1 if first <= context else first + stride)
        yield Span(max(0, end - 1 - context), first, end)
        first = end


def score(
    model: Mistral,
    ids: Sequence[int],
    first: int = 1,
    cache: RollingCache | None = None,
    advance: Callable[[int], None] | None = None,
) -> Scores:
    """Score ids[first:], each given all before it that the model and its cache can see.

    first    at least 1
    cache    an empty one, to be read through; `advance` is told how many tokens each step has
             scored

    Raises TokenizerError (ids outside the vocabulary), PromptTooLongError, InputError.
    """
    cache = model.new_cache() if cache is None else cache
    _check(model, ids, first, cache)
    found = []
    for logits, following in _steps(ids, first, read_logits(model, mx.array([ids[:-1]]), cache, first - 1)):
        found.append(scores_of(logits, following))
        if advance:
            advance(len(following))
    return Scores(*map(np.concatenate, zip(*found, strict=True)))


def compare(
    model: Mistral,
    reference: Mistral,
    ids: Sequence[int],
    first: int = 1,
    caches: tuple[RollingCache, RollingCache] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Comparison:
    """How far `model` is from `reference` at each of ids[first:]; both read the text in step.

    caches  of the model and of the reference, empty; otherwise as for `score`. Raises InputError
            for two vocabularies.
    """
    both = model, reference
    if len({side.config.vocab_size for side in both}) != 1:
        sizes = " and ".join(f"{side.config.vocab_size:,}" for side in both)
        raise InputError(f"vocabularies of {sizes} tokens cannot be compared; give two models of one family")
    caches = caches or (model.new_cache(), reference.new_cache())
    for side, cache in zip(both, caches, strict=True):
        _check(side, ids, first, cache)
    chunk = min(map(default_chunk, both))
    inputs = mx.array([ids[:-1]])
    mine, theirs = (
        read_logits(side, inputs, cache, first - 1, chunk) for side, cache in zip(both, caches, strict=True)
    )
    found = []
    for logits, following in _steps(ids, first, mine):
        found.append(compare_logits(logits, next(theirs)[0], following))
        if advance:
            advance(len(following))
    return Comparison(*map(np.concatenate, zip(*found, strict=True)))


def read_logits(
    model: Mistral, ids: mx.array, cache: KVCache, first: int = 0, chunk: int | None = None
) -> Iterator[mx.array]:
    """Yield logits [B, positions, vocab_size] at positions first, first + 1, … of ids [B, L].

    Rows of a batch may be padded on the right: no position sees what comes after it.
    """
    rows, length = ids.shape
    chunk = max(1, (chunk or default_chunk(model)) // rows)
    held = max(1, _POSITIONS // rows)
    for start in range(0, length, chunk):
        hidden = model.hidden(ids[:, start : start + chunk], cache)
        mx.eval(hidden, *cache.arrays)
        for position in range(max(0, first - start), hidden.shape[1], held):
            yield model.head(hidden[:, position : position + held])
        mx.clear_cache()  # the chunk's temporaries would stay in MLX's pool


def scores_of(logits: mx.array, following: mx.array) -> Scores:  # [..., vocab_size], [...]
    """Scores [...] of the tokens `following`."""
    logprobs = _picked(log_softmax(logits), following)
    return Scores(np.array(logprobs), np.array(mx.argmax(logits, axis=-1) == following))


def compare_logits(logits: mx.array, reference: mx.array, following: mx.array) -> Comparison:
    """Compare logits [L, vocab_size] of both sides at each position; the tokens [L] do follow."""
    q, p = log_softmax(logits), log_softmax(reference)
    agrees = mx.argmax(logits, axis=-1) == mx.argmax(reference, axis=-1)
    return Comparison(_kl(p, q), np.array(agrees), *(np.array(_picked(side, following)) for side in (q, p)))


def log_softmax(logits: mx.array) -> mx.array:
    """Log probabilities in float32, over the last axis."""
    logits = logits.astype(mx.float32)
    # First: a large number would swallow the logarithm.
    logits = logits - mx.max(logits, axis=-1, keepdims=True)
    if not on_cpu():
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    # NumPy's exp uses the processor's vectors: eleven times as fast as MLX's, a row at a time.
    rows = np.array(logits, copy=False).reshape(-1, logits.shape[-1])
    totals = np.log([np.exp(row).sum() for row in rows], dtype=np.float32)
    return logits - mx.array(totals).reshape(*logits.shape[:-1], 1)


def _kl(p: mx.array, q: mx.array) -> np.ndarray:
    """KL(p ‖ q) [L] of log probabilities [L, vocab_size]; rounding does not take it below 0."""
    if on_cpu():
        pairs = zip(np.array(p, copy=False), np.array(q, copy=False), strict=True)
        kl = np.array([np.dot(np.exp(a), a - b) for a, b in pairs], np.float32)
    else:
        kl = np.array((mx.exp(p) * (p - q)).sum(axis=-1))
    return np.maximum(kl, 0)


def _picked(logprobs: mx.array, ids: mx.array) -> mx.array:
    return mx.take_along_axis(logprobs, ids[..., None], axis=-1)[..., 0]


def _steps(ids: Sequence[int], first: int, read: Iterator[mx.array]) -> Iterator[tuple[mx.array, mx.array]]:
    """Each step's logits [L, vocab_size] of one text, and the tokens [L] that do follow."""
    for logits in read:
        yield logits[0], mx.array(list(ids[first : first + logits.shape[1]]))
        first += logits.shape[1]


def _check(model: Mistral, ids: Sequence[int], first: int, cache: RollingCache) -> None:
    if not 1 <= first < len(ids):
        raise InputError(f"there is nothing to score from token {first} of {len(ids)} on; give a longer text")
    if cache.offset:
        raise InputError("a text is scored through an empty cache")
    check_prompt(model, ids[:-1], cache)
    if not 0 <= ids[-1] < model.config.vocab_size:
        check_prompt(model, ids[-1:], cache)  # says what is wrong with it
