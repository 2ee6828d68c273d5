"""Log probabilities of an answer: the model's own.

It does not matter what chose the tokens, nor in how many passes.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import small_config, small_model

from m7mlx import Piece, PromptLookup, Request, Sampling, Tokenizer, stream_generate
from m7mlx.constrain import Unconstrained
from m7mlx.pace import Pace
from m7mlx.scheduler import Scheduler

MODEL = small_model(small_config(vocab_size=32000))
PROMPT = [1, *[40, 50, 60, 70] * 5]
DRAWN = Sampling(temperature=1.5, top_p=0.9, seed=5, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return mistral_tokenizers["v1"]


class Always(Pace):
    """Drafts whatever it costs."""

    def plan(self, most: int) -> int:
        return min(5, most)


def lookup() -> PromptLookup:
    drafter = PromptLookup()
    drafter.pace = Always()
    return drafter


def check(pieces: list[Piece], prompt: list[int], top: int) -> list[int]:
    """The ids of an answer, once each log probability is that of one pass over everything."""
    ids = [token for piece in pieces for token in piece.ids]
    told = [one for piece in pieces for one in piece.logprobs]
    assert [len(piece.ids) for piece in pieces] == [len(piece.logprobs) for piece in pieces]
    assert [one.id for one in told] == ids
    logits = MODEL(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for one, row in zip(told, expected, strict=True):
        assert one.logprob == pytest.approx(row[one.id], abs=1e-4)
        assert len(one.top) == top
        assert [value for _, value in one.top] == pytest.approx(np.sort(row)[::-1][:top], abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx([row[token] for token, _ in one.top], abs=1e-4)
    return ids


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN])
@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("top", [0, 4])
def test_they_are_the_models_own(tokenizer: Tokenizer, sampling: Sampling, drafted: bool, top: int) -> None:
    """Log probabilities are those before temperature, filters and penalty.

    So they are with drafts, too, which are looked at several at a time.
    """
    options: dict[str, Any] = {"sampling": sampling, "max_tokens": 40}
    plain = [i for p in stream_generate(MODEL, tokenizer, PROMPT, **options) for i in p.ids]
    drafter = lookup() if drafted else None
    pieces = list(stream_generate(MODEL, tokenizer, PROMPT, logprobs=top, drafter=drafter, **options))
    assert check(pieces, PROMPT, top) == plain


def test_nobody_asked_for_them(tokenizer: Tokenizer) -> None:
    assert not any(piece.logprobs for piece in stream_generate(MODEL, tokenizer, PROMPT, max_tokens=9))


def test_they_belong_to_their_tokens_with_stops_grammars_and_pieces_held_back(tokenizer: Tokenizer) -> None:
    whole = "".join(p.text for p in stream_generate(MODEL, tokenizer, PROMPT, max_tokens=30))
    options: dict[str, Any] = {"logprobs": 2, "max_tokens": 30}
    check(list(stream_generate(MODEL, tokenizer, PROMPT, stop=[whole[12:40]], **options)), PROMPT, 2)
    check(list(stream_generate(MODEL, tokenizer, PROMPT, stop=[whole[12:30] + "\0"], **options)), PROMPT, 2)
    check(list(stream_generate(MODEL, tokenizer, PROMPT, constraint=Unconstrained(), **options)), PROMPT, 2)


def test_a_conversation_that_is_kept_and_one_among_others_give_the_same(tokenizer: Tokenizer) -> None:
    cache = MODEL.new_cache(slack=32)
    first = list(stream_generate(MODEL, tokenizer, PROMPT, cache=cache, max_tokens=8, logprobs=3))
    longer = [*PROMPT, *check(first, PROMPT, 3), 9, 10]
    check(list(stream_generate(MODEL, tokenizer, longer, cache=cache, max_tokens=8, logprobs=3)), longer, 3)
    scheduler = Scheduler(MODEL, tokenizer, rows=2)
    scheduler.add(Request(PROMPT, max_tokens=6))
    number, found, more = scheduler.add(Request(longer, DRAWN, 8, logprobs=3)), [], True
    while more:
        told, more = scheduler.step()
        found += [piece for one, piece in told if one == number]
    check(found, longer, 3)
