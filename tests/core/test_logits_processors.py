"""Logits processors, mlx-lm's own among them.

Each is asked once a token with all ids before it, and none too often.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors
from models import small_config, small_model

from m7mlx import Piece, PromptLookup, Request, Sampling, Tokenizer, stream_generate
from m7mlx.errors import InputError
from m7mlx.scheduler import Scheduler

MODEL = small_model(small_config(vocab_size=32000))
PROMPT = [1, 40, 50, 60, 70]
DRAWN = Sampling(temperature=1.2, seed=5)


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return mistral_tokenizers["v1"]


def ids_of(tokenizer: Tokenizer, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
    options = {"max_tokens": 20} | options
    return [i for piece in stream_generate(MODEL, tokenizer, prompt, **options) for i in piece.ids]


class Recorder:
    """A processor that notes the ids that it is called with."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, ids: mx.array, logits: mx.array) -> mx.array:
        assert ids.dtype == mx.int32 and logits.shape == (1, 32000)
        self.seen.append(ids.tolist())  # type: ignore[arg-type]
        return logits


@pytest.mark.parametrize("drawn", [False, True])
def test_those_of_mlx_lm_do_what_settings_do(tokenizer: Tokenizer, drawn: bool) -> None:
    sampling: dict[str, Any] = {"temperature": 1.2, "seed": 5} if drawn else {}
    penalty = make_logits_processors(repetition_penalty=1.4, repetition_context_size=64)
    expected = ids_of(tokenizer, sampling=Sampling(repetition_penalty=1.4, **sampling))
    plain = ids_of(tokenizer, sampling=Sampling(**sampling))
    assert ids_of(tokenizer, sampling=Sampling(**sampling), logits_processors=penalty) == expected != plain
    ban = make_logits_processors(logit_bias=dict.fromkeys(plain, -100.0))
    assert not set(ids_of(tokenizer, sampling=Sampling(**sampling), logits_processors=ban)) & set(plain)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN])
def test_one_that_changes_nothing_changes_nothing(tokenizer: Tokenizer, sampling: Sampling) -> None:
    expected = ids_of(tokenizer, sampling=sampling)
    assert ids_of(tokenizer, sampling=sampling, logits_processors=[lambda ids, logits: logits]) == expected


@pytest.mark.parametrize("ends", ["at a limit", "by itself"])
def test_each_is_asked_once_for_each_token_with_all_ids_before_it(tokenizer: Tokenizer, ends: str) -> None:
    """However much of the prompt a cache holds already; and not for a token that does not come."""
    cache, prompt = MODEL.new_cache(slack=32), PROMPT
    usual = tokenizer.eos_ids
    for _ in range(3):
        if ends == "by itself":
            tokenizer.eos_ids = frozenset({ids_of(tokenizer, prompt, sampling=DRAWN)[6]})
        recorder = Recorder()
        try:
            ids = ids_of(tokenizer, prompt, sampling=DRAWN, cache=cache, logits_processors=[recorder])
        finally:
            tokenizer.eos_ids = usual
        assert len(ids) == (20 if ends == "at a limit" else 7)
        assert recorder.seen == [[*prompt, *ids[:n]] for n in range(len(ids))]
        prompt = [*prompt, *ids, 7]


def test_an_answer_that_goes_on_sees_what_it_said(tokenizer: Tokenizer) -> None:
    whole, recorder = ids_of(tokenizer, sampling=DRAWN), Recorder()
    rest = ids_of(
        tokenizer, sampling=DRAWN, continues=whole[:8], max_tokens=12, logits_processors=[recorder], stop=["\0"]
    )
    assert whole[:8] + rest == whole
    assert recorder.seen[0] == [*PROMPT, *whole[:8]]


def test_what_they_write_into_logits_stays_out_of_log_probabilities(tokenizer: Tokenizer) -> None:
    def push(ids: mx.array, logits: mx.array) -> mx.array:
        logits[:, 77] = 1000.0
        return logits

    options: dict[str, Any] = {"max_tokens": 3, "logprobs": 1}
    (first, *_) = stream_generate(MODEL, tokenizer, PROMPT, **options)
    pushed = list(stream_generate(MODEL, tokenizer, PROMPT, logits_processors=[push], **options))
    assert [i for piece in pushed for i in piece.ids] == [77] * 3
    one = next(one for piece in pushed for one in piece.logprobs)
    assert one.id == 77 and one.logprob < -1
    assert one.top == first.logprobs[0].top


def test_what_one_raises_comes_after_the_tokens_before_it(tokenizer: Tokenizer) -> None:
    def third(ids: mx.array, logits: mx.array) -> mx.array:
        if len(ids) == len(PROMPT) + 3:
            raise ZeroDivisionError
        return logits

    cache, pieces = MODEL.new_cache(), list[Piece]()
    with pytest.raises(ZeroDivisionError):
        pieces.extend(stream_generate(MODEL, tokenizer, PROMPT, cache=cache, logits_processors=[third]))
    expected = ids_of(tokenizer)
    found = [i for piece in pieces for i in piece.ids]
    assert found == expected[: len(found)] != [] and cache.ids == [*PROMPT, *expected[:3]]
    assert ids_of(tokenizer, [*PROMPT, *expected[:3]], cache=cache, max_tokens=17) == expected[3:]
    assert ids_of(tokenizer, logits_processors=[third], max_tokens=3) == expected[:3]  # it was not asked


def test_what_cannot_be_is_said_in_a_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="leave out the drafter"):
        ids_of(tokenizer, drafter=PromptLookup(), logits_processors=[lambda ids, logits: logits])
    for wrong in (None, mx.zeros((1, 5)), 3):
        with pytest.raises(InputError, match="must return logits of the shape"):
            ids_of(tokenizer, logits_processors=[lambda ids, logits, wrong=wrong: wrong])


def test_each_answer_of_a_batch_has_its_own(tokenizer: Tokenizer) -> None:
    def only(token: int) -> Any:
        return lambda ids, logits: mx.where(mx.arange(logits.shape[-1]) == token, logits, -mx.inf)

    scheduler, recorder = Scheduler(MODEL, tokenizer, rows=4), Recorder()
    wanted = {
        scheduler.add(Request(PROMPT, max_tokens=6, logits_processors=[only(300)])): [300] * 6,
        scheduler.add(Request(PROMPT, DRAWN, 6, logits_processors=[only(301)])): [301] * 6,
        scheduler.add(Request(PROMPT, DRAWN, 6, logits_processors=[recorder])): ids_of(
            tokenizer, sampling=DRAWN, max_tokens=6
        ),
        scheduler.add(Request(PROMPT, max_tokens=6)): ids_of(tokenizer, max_tokens=6),
    }
    broken = scheduler.add(Request(PROMPT, max_tokens=6, logits_processors=[lambda ids, logits: None]))  # type: ignore[list-item, return-value]
    found: dict[int, list[int]] = {number: [] for number in wanted}
    failed, more = [], True
    while more:
        told, more = scheduler.step()
        for number, piece in told:
            found.setdefault(number, []).extend(piece.ids)
            failed += [(number, type(piece.error))] if piece.error is not None else []
    assert failed == [(broken, InputError)]
    assert {number: ids for number, ids in found.items() if number != broken} == wanted
    assert recorder.seen[:6] == [[*PROMPT, *wanted[broken - 2][:n]] for n in range(6)]
