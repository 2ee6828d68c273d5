"""How likely the model itself found tokens: those that were chosen, and those of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx


class TokenLogprobs(NamedTuple):
    """How likely the model itself found a token, before anything changes its logits.

    id       the token
    logprob  its log probability, natural
    top      (id, log probability) of the likeliest tokens, best first
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]


class Scored(NamedTuple):
    """`TokenLogprobs` on the device: of a token [1], and of the likeliest ids [n], best first."""

    token: mx.array
    logprob: mx.array
    ids: mx.array
    values: mx.array

    def read(self) -> TokenLogprobs:
        """Wait for the device, and read the log probabilities."""
        ids: list[int] = self.ids.tolist()  # type: ignore[assignment]
        values: list[float] = self.values.tolist()  # type: ignore[assignment]
        top = list(zip(ids, values, strict=True))
        return TokenLogprobs(self.token.item(), self.logprob.item(), top)  # type: ignore[arg-type]


def score_token(logits: mx.array, token: mx.array, n: int) -> Scored:
    """Score a token [1] that was chosen from logits [1, vocab_size], and the `n` likeliest."""
    logits = logits[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits)
    best = mx.argsort(-logprobs)[:n]
    scored = Scored(token, logprobs[token], best, logprobs[best])
    mx.async_eval(*scored)  # before the next pass, or whoever reads it would wait for that
    return scored


def score_given(logits: mx.array, following: Sequence[int], n: int) -> list[TokenLogprobs]:
    """Score tokens that stand in a text, by logits [L, vocab_size], and the `n` likeliest of each.

    following  the token behind each position; shorter than L where a text ends
    """
    logits = logits[: len(following)].astype(mx.float32)
    logits = logits - mx.max(logits, axis=-1, keepdims=True)  # a large one would swallow the sum
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    given = mx.take_along_axis(logprobs, mx.array(list(following))[:, None], axis=-1)[:, 0]
    best = mx.argsort(-logprobs, axis=-1)[:, :n]
    told: list[tuple[int, float, list[int], list[float]]] = list(
        zip(
            following,
            given.tolist(),  # type: ignore[arg-type]
            best.tolist(),  # type: ignore[arg-type]
            mx.take_along_axis(logprobs, best, axis=-1).tolist(),  # type: ignore[arg-type]
            strict=True,
        )
    )
    return [
        TokenLogprobs(token, logprob, list(zip(ids, values, strict=True))) for token, logprob, ids, values in told
    ]
