"""Texts → vectors: the model's last hidden states, pooled over the tokens of each text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import mlx.core as mx

from m7mlx.decode import default_chunk
from m7mlx.errors import InputError
from m7mlx.model import Mistral
from m7mlx.prompt import check_prompt, encode_prompt
from m7mlx.tokens.tokenizer import Tokenizer

Pooling = Literal["mean", "last"]
_MOST_ROWS = 32  # short texts that share a pass
_TINY = 1e-12  # so that a vector of zeros stays one


def embed(
    model: Mistral,
    tokenizer: Tokenizer,
    texts: Sequence[str | Sequence[int]],
    *,
    pooling: Pooling = "mean",
    normalize: bool = False,
) -> mx.array:
    """Return a float32 vector for each text, [n, hidden_size].

    texts      texts, or lists of token ids; a text begins with the start token where there is one
    pooling    "mean": the mean, over all tokens of a text, of the hidden states behind the last
               layer and its norm, which the head reads; "last": that of the last token, for models
               trained for it (they often end a text with the end token: then give ids)
    normalize  scale each vector to length 1

    Long texts are read in chunks through a cache of their own: memory stays bounded, and a model's
    window applies as in generation.

    Raises InputError, TokenizerError; PromptTooLongError for a text beyond the context.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence) or not all(map(_is_text, texts)):
        raise InputError("embed takes a list of texts, or of lists of token ids")
    if pooling not in ("mean", "last"):
        raise InputError(f'pooling must be "mean" or "last", not {pooling!r:.100}')
    if model.exchange is not None:
        raise InputError("a model that is divided among processes embeds no texts; load it on one machine")
    empty = model.new_cache()
    prompts = [list(encode_prompt(tokenizer, text)) for text in texts]
    for ids in prompts:
        check_prompt(model, ids, empty)
    vectors: dict[int, mx.array] = {}
    for pooled in passes(model, prompts, pooling=pooling, normalize=normalize):
        vectors |= pooled
    if not vectors:
        return mx.zeros((0, model.config.hidden_size))
    return mx.stack([vectors[i] for i in range(len(prompts))])


def passes(
    model: Mistral,
    prompts: Sequence[Sequence[int]],
    *,
    pooling: Pooling,
    normalize: bool,
) -> Iterator[Mapping[int, mx.array]]:
    """Yield after each pass the vectors that it has completed, by the number of their prompt.

    What else a program has to do can be done between passes, none of which takes longer than that
    of a chunk of a prompt. The prompts have been checked (`m7mlx.prompt.check_prompt`).
    """
    for numbers in _groups(prompts, default_chunk(model)):
        sums = mx.zeros(())
        for so_far in _sums(model, [prompts[i] for i in numbers], pooling):
            sums = so_far
            yield {}
        lengths = mx.array([len(prompts[i]) for i in numbers])[:, None]
        found = sums / lengths if pooling == "mean" else sums
        if normalize:
            found = found / mx.maximum(mx.linalg.norm(found, axis=1, keepdims=True), _TINY)
        mx.eval(found)
        yield dict(zip(numbers, found, strict=True))


def _is_text(text: object) -> bool:
    """Tell whether `text` is a text or a list of ids, and not a conversation."""
    return isinstance(text, str) or (isinstance(text, Sequence) and all(isinstance(i, int) for i in text))


def _groups(prompts: Sequence[Sequence[int]], chunk: int) -> list[list[int]]:
    """Numbers of the prompts that are read together: of about one length, to fill a chunk."""
    groups: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        length = len(prompts[i])
        fits = groups and len(groups[-1]) < _MOST_ROWS and (len(groups[-1]) + 1) * length <= chunk
        if fits:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _sums(model: Mistral, prompts: Sequence[Sequence[int]], pooling: Pooling) -> Iterator[mx.array]:
    """Yield the sums [rows, hidden_size] of what is pooled of texts read together, chunk by chunk.

    Shorter ones are filled up behind their end, where no token of theirs looks.
    """
    lengths = mx.array([len(ids) for ids in prompts])[:, None]
    longest, chunk, cache = max(map(len, prompts)), default_chunk(model), model.new_cache()
    ids = mx.array([[*ids, *[0] * (longest - len(ids))] for ids in prompts])
    total = mx.zeros((len(prompts), model.config.hidden_size))
    for start in range(0, longest, chunk):
        hidden = model.hidden(ids[:, start : start + chunk], cache).astype(mx.float32)
        positions = mx.arange(start, start + hidden.shape[1])[None]
        wanted = positions < lengths if pooling == "mean" else positions == lengths - 1
        total = total + (wanted[:, :, None] * hidden).sum(axis=1)
        mx.eval(total, *cache.arrays)
        mx.clear_cache()  # the chunk's temporaries would stay in MLX's pool
        yield total
