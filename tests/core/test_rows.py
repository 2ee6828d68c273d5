"""Answers that are drafted for beside others: everybody's tokens are those of plain decoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import pytest
from alone import alone, prompt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import mixed_config, small_config, small_model

import m7mlx.rows
from m7mlx import Piece, Request, Sampling
from m7mlx.batch import BatchCache
from m7mlx.constrain import Unconstrained
from m7mlx.decode import prefill
from m7mlx.errors import InputError
from m7mlx.numbered import Lookup
from m7mlx.pace import Costs, Odds
from m7mlx.sampling import Sampler
from m7mlx.scheduler import Scheduler
from m7mlx.speculative import PromptLookup, settle
from m7mlx.tokens.tokenizer import Tokenizer

MODELS = {window: small_model(small_config(vocab_size=32000, sliding_window=window)) for window in (7, None)}
MODELS["mixed"] = small_model(mixed_config(vocab_size=32000))  # type: ignore[index]


class Always(Costs):
    """Drafts whenever it may."""

    def plan(self, texts: Sequence[tuple[Odds, int]]) -> list[int]:
        return [max(0, min(5, most)) for _, most in texts]


class Oracle(PromptLookup):
    """Knows the answers, and is right as often as told."""

    answers: ClassVar[dict[tuple[int, ...], list[int]]] = {}
    wrong: ClassVar[set[int]] = set()
    quiet: ClassVar[range] = range(0)  # where it has nothing to say

    def begin(self, ids: Sequence[int]) -> None:
        self.prompt = tuple(ids)

    def promising(self, ids: Sequence[int]) -> bool:
        return True

    def guess(self, ids: Sequence[int]) -> int:
        return next(iter(self.draft(ids[:-1], ids[-1], 1, None)), -1)

    def draft(self, ids: Sequence[int], token: int, most: int, sampler: Sampler | None) -> list[int]:
        at = len(ids) - len(self.prompt) + 1
        if at in self.quiet:
            return []
        answer = self.answers[self.prompt][at : at + most]
        return [(token + 1) % 32000 if at + i in self.wrong else token for i, token in enumerate(answer)]


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return mistral_tokenizers["v1"]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m7mlx.rows, "Costs", Always)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch, always: None) -> type[Oracle]:
    monkeypatch.setattr(m7mlx.rows, "PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "answers", {})
    monkeypatch.setattr(Oracle, "wrong", set())
    monkeypatch.setattr(Oracle, "quiet", range(0))
    monkeypatch.setattr(m7mlx.rows, "_PATIENCE", 3)
    monkeypatch.setattr(m7mlx.rows, "_SURE", 1)
    return Oracle


def run(scheduler: Scheduler, pieces: dict[int, list[Piece]], steps: int = 10_000) -> int:
    """Take so many steps, or all; return how many there were."""
    for count in range(steps):
        told, more = scheduler.step()
        for number, piece in told:
            assert not pieces[number] or pieces[number][-1].finish_reason is None
            pieces[number].append(piece)
        if not more:
            return count + 1
    return steps


def ids_of(pieces: Sequence[Piece]) -> list[int]:
    return [i for piece in pieces for i in piece.ids]


def assert_same(found: Sequence[Piece], expected: Sequence[Piece]) -> None:
    assert ids_of(found) == ids_of(expected)
    assert "".join(piece.text for piece in found) == "".join(piece.text for piece in expected)
    assert (found[-1].finish_reason, found[-1].stop) == (expected[-1].finish_reason, expected[-1].stop)
    one, other = ([score for piece in pieces for score in piece.logprobs] for pieces in (found, expected))
    assert [score.id for score in one] == [score.id for score in other]
    assert [score.logprob for score in one] == pytest.approx([score.logprob for score in other], abs=1e-4)
    assert found[-1].stats is not None and found[-1].stats.generated_tokens == len(ids_of(found))


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.9, seed=3, top_k=4),
    Sampling(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3),
]
arrivals = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps until the next one comes
        st.integers(1, 40),  # tokens of the prompt
        st.integers(1, 20),  # tokens wanted
        st.sampled_from(SAMPLINGS),
        st.sampled_from([None, 0, 2]),  # log probabilities
        st.sampled_from([-1, -1, 3, 8]),  # cancelled after so many steps; below 0 never
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.usefixtures("computed_by")
@given(
    coming=arrivals,
    window=st.sampled_from([7, None, "mixed", "bounded"]),
    rows=st.integers(1, 4),
    drafted=st.integers(1, 3),
    wrong=st.sets(st.integers(0, 30)),
    slack=st.sampled_from([2, 8, 20]),
    quiet=st.sampled_from([range(0), range(4, 12)]),
)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_everybody_is_answered_as_if_alone(
    tokenizer: Tokenizer,
    oracle: type[Oracle],
    coming: list[tuple[int, int, int, Sampling, int | None, int]],
    window: Any,
    rows: int,
    drafted: int,
    wrong: set[int],
    slack: int,
    quiet: range,
) -> None:
    """Whatever is guessed, whoever comes and goes, and so is who goes on from them."""
    size = 11 if window == "bounded" else None
    model = MODELS[None if size else window]
    scheduler = Scheduler(model, tokenizer, rows=rows, kept=2, slack=slack, drafted=drafted, max_kv_size=size)
    oracle.wrong, oracle.quiet = wrong, quiet
    pieces: dict[int, list[Piece]] = defaultdict(list)
    asked: dict[int, tuple[Request, list[Piece]]] = {}
    for seed, (wait, length, wanted, sampling, logprobs, stays) in enumerate(coming):
        request = Request(prompt(seed % 3, length), sampling, wanted, logprobs=logprobs)
        expected = alone(model, tokenizer, request, size)
        oracle.answers[tuple(request.ids)] = ids_of(expected)
        number = scheduler.add(request)
        asked[number] = request, expected
        run(scheduler, pieces, wait)
        if stays >= 0:
            run(scheduler, pieces, stays)
            if piece := scheduler.cancel(number):
                pieces[number].append(piece)
    run(scheduler, pieces)
    for number, (request, expected) in asked.items():
        if pieces[number][-1].finish_reason == "cancelled":
            assert ids_of(pieces[number]) == ids_of(expected)[: len(ids_of(pieces[number]))]
        else:
            assert_same(pieces[number], expected)
        later = Request([*request.ids, *ids_of(pieces[number]), 5, 6], max_tokens=4)
        expected = alone(model, tokenizer, later, size)
        oracle.answers[tuple(later.ids)] = ids_of(expected)
        number = scheduler.add(later)
        run(scheduler, pieces)
        assert_same(pieces[number], expected)


@pytest.mark.usefixtures("computed_by")
def test_several_passes_at_once_are_those_passes(computed_by: None) -> None:
    for model in MODELS.values():
        caches = [model.new_cache(slack=8) for _ in range(4)]
        for seed, cache in enumerate(caches):
            prefill(model, prompt(seed, 9 + 5 * seed), cache)
        groups: list[Any] = [BatchCache(caches[:2]), caches[2], caches[3]]
        ids = [mx.array([[4], [5]]), mx.array([[6, 7, 8]]), mx.array([[9]])]
        expected = [
            model.logits(*one) for one in zip(ids, [BatchCache(caches[:2]), *map(_copy, caches[2:])], strict=True)
        ]
        found = model.logits_together(list(zip(ids, groups, strict=True)))
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            assert mx.allclose(one, other, atol=1e-3).item()
        assert groups[0].offsets == [10, 15] and [c.offset for c in caches[2:]] == [22, 25]


def _copy(cache: Any) -> Any:
    other = cache.like()
    other.restore(cache.snapshot())
    return other


def test_right_drafts_take_few_steps(tokenizer: Tokenizer, oracle: type[Oracle]) -> None:
    """One answer in the batch, a grammar's, is told a token at a time beside two that are not."""
    model = MODELS[7]
    asked = [Request(prompt(i, 9), SAMPLINGS[i % 2], 31) for i in range(3)]
    for request in asked:
        oracle.answers[tuple(request.ids)] = ids_of(alone(model, tokenizer, request))
    scheduler = Scheduler(model, tokenizer, rows=4, drafted=2)
    bound = scheduler.add(Request(prompt(5, 9), max_tokens=31, constraint=Unconstrained()))
    numbers = [scheduler.add(request) for request in asked]
    pieces: dict[int, list[Piece]] = defaultdict(list)
    run(scheduler, pieces, 8)
    lengths = [len(ids_of(pieces[number])) for number in (*numbers, bound)]
    assert min(lengths[:2]) >= 30 and max(lengths[2:]) <= 8  # two are apart
    run(scheduler, pieces)
    for number, request in zip(numbers, asked, strict=True):
        assert_same(pieces[number], alone(model, tokenizer, request))
    assert_same(pieces[bound], alone(model, tokenizer, Request(prompt(5, 9), max_tokens=31)))


def test_who_is_not_drafted_for_joins_the_others(tokenizer: Tokenizer, oracle: type[Oracle]) -> None:
    """Once it is not alone; and goes on as if nothing had been."""
    model, requests = MODELS[7], [Request(prompt(i, 9 + i), max_tokens=25) for i in range(3)]
    for request in requests:
        oracle.answers[tuple(request.ids)] = ids_of(alone(model, tokenizer, request))
    oracle.quiet = range(40)
    scheduler, pieces = Scheduler(model, tokenizer, drafted=2), defaultdict[int, list[Piece]](list)
    numbers = [scheduler.add(requests[0])]
    run(scheduler, pieces, 8)
    assert not len(scheduler._rows.batch or ())
    numbers += [scheduler.add(request) for request in requests[1:]]
    run(scheduler, pieces, 4)
    assert len(scheduler._rows.batch or ()) == 3
    run(scheduler, pieces)
    for number, request in zip(numbers, requests, strict=True):
        assert_same(pieces[number], alone(model, tokenizer, request))


def test_stop_texts_end_an_answer_amid_a_draft(tokenizer: Tokenizer, oracle: type[Oracle]) -> None:
    """What was right behind them is undone, so that the conversation can be gone on with."""
    model, ids = MODELS[7], prompt(2, 12)
    plain = alone(model, tokenizer, Request(ids, max_tokens=30))
    oracle.answers[tuple(ids)] = ids_of(plain)
    text = "".join(piece.text for piece in plain)
    ends = set()
    for at in range(len(text) // 3, len(text) // 3 + 9, 3):
        request = Request(ids, max_tokens=30, stop=(text[at : at + 3],))
        scheduler, pieces = Scheduler(model, tokenizer, drafted=1), defaultdict[int, list[Piece]](list)
        number = scheduler.add(request)
        run(scheduler, pieces)
        expected = alone(model, tokenizer, request)
        assert expected[-1].finish_reason == "stop"
        assert_same(pieces[number], expected)
        assert scheduler.kept[0].cache.offset == len(scheduler.kept[0].ids)
        ends.add(len(ids_of(expected)))
    assert len(ends) > 1


def test_a_draft_that_cannot_be_checked_fails_its_own_answer(
    tokenizer: Tokenizer, oracle: type[Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, requests = MODELS[None], [Request(prompt(i, 9), max_tokens=12) for i in range(3)]
    for request in requests:
        oracle.answers[tuple(request.ids)] = ids_of(alone(model, tokenizer, request))
    real, broken = settle, [True]

    def once(*args: Any) -> tuple[int, int]:
        if broken:
            broken.clear()
            raise KeyError("nobody foresees this")
        return real(*args)

    monkeypatch.setattr(m7mlx.rows, "settle", once)
    scheduler, pieces = Scheduler(model, tokenizer, drafted=2), defaultdict[int, list[Piece]](list)
    numbers = [scheduler.add(request) for request in requests]
    run(scheduler, pieces)
    assert not broken
    failed = [number for number in numbers if isinstance(pieces[number][-1].error, KeyError)]
    assert len(failed) == 1
    for number, request in zip(numbers, requests, strict=True):
        if number not in failed:
            assert_same(pieces[number], alone(model, tokenizer, request))


def test_a_prediction_is_looked_up(tokenizer: Tokenizer, always: None) -> None:
    """It makes no difference to the tokens, and the cost tells how much of it was right."""
    model = MODELS[7]
    plain = alone(model, tokenizer, Request(prompt(4, 20), SAMPLINGS[1], 31))
    answer = ids_of(plain)
    changed = [*answer[:10], 7, 8, 9, *answer[12:]]
    for prediction, least, steps in ((answer, 24, 9), (changed, 14, 14), (prompt(9, 30), 0, 35), ("", 0, 35)):
        scheduler, pieces = Scheduler(model, tokenizer, drafted=1), defaultdict[int, list[Piece]](list)
        number = scheduler.add(Request(prompt(4, 20), SAMPLINGS[1], 31, prediction=prediction))
        assert run(scheduler, pieces) <= steps
        assert_same(pieces[number], plain)
        stats = pieces[number][-1].stats
        assert stats is not None and stats.accepted_prediction >= least
        assert bool(stats.rejected_prediction) == (prediction == changed)
    assert Request.from_dict(Request([1], prediction=[2, 3]).to_dict()).prediction == [2, 3]
    with pytest.raises(InputError):
        Scheduler(model, tokenizer, drafted=-1)


@pytest.mark.parametrize("pays", [True, False])
def test_who_copies_goes_apart_where_it_pays(
    tokenizer: Tokenizer, oracle: type[Oracle], monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    """Beside others nobody goes before it was seen to copy; it comes back when it no more does."""
    monkeypatch.setattr(Always, "plan", lambda _, texts: [min(5, most) if pays else 0 for _, most in texts])
    monkeypatch.setattr(m7mlx.rows, "_SURE", 3)
    model, requests = MODELS[7], [Request(prompt(i, 9 + i), max_tokens=40) for i in range(3)]
    for request in requests:
        oracle.answers[tuple(request.ids)] = ids_of(alone(model, tokenizer, request))
    oracle.wrong, oracle.quiet = {2, 5, 8}, range(25, 60)
    scheduler, pieces = Scheduler(model, tokenizer, drafted=3), defaultdict[int, list[Piece]](list)
    numbers = [scheduler.add(request) for request in requests]
    apart, steps = [], 0
    while scheduler._rows.answers or not steps:
        steps += run(scheduler, pieces, 1)
        apart.append(len(scheduler._rows._apart))
    first = next((i for i, n in enumerate(apart) if n > 1), None)
    if not pays:
        assert first is None and steps > 39
    else:
        assert first is not None and 10 < first < 16 and steps < 36
        assert apart[-4] == 0 and max(apart) == 3
    for number, request in zip(numbers, requests, strict=True):
        assert_same(pieces[number], alone(model, tokenizer, request))


def test_nothing_is_looked_up_where_no_draft_could_pay(
    tokenizer: Tokenizer, oracle: type[Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Always, "plan", lambda _, texts: [0 for _ in texts])

    def guess(_: Oracle, ids: Sequence[int]) -> int:
        asked.append(len(ids))
        return -1

    monkeypatch.setattr(oracle, "guess", guess)
    scheduler, pieces = Scheduler(MODELS[7], tokenizer, drafted=2), defaultdict[int, list[Piece]](list)
    for seed in range(3):
        scheduler.add(Request(prompt(seed, 9), max_tokens=12))
    run(scheduler, pieces)
    assert not asked


def test_what_would_be_drafted_is_guessed(tokenizer: Tokenizer) -> None:
    """The guess is the first token of the draft, whatever was looked up between them."""
    text = [1, *range(10, 40), 7, *range(20, 30), 8, *range(13, 19)]
    drafter, other = PromptLookup(), PromptLookup()
    drafter.begin(text[:33])
    other.begin(text[:33])
    for end in range(34, len(text) + 1):
        draft = other.draft(text[: end - 1], text[end - 1], 3, None)  # type: ignore[arg-type]
        assert drafter.guess(text[:end]) == next(iter(draft), -1), end
    lookup = Lookup(PromptLookup(), [1, *range(10, 40)])
    runs = []
    for end in range(32, 43):
        lookup.saw(text[:end])
        runs.append(lookup.run)
    assert runs == [0, 0, 0, 0, *range(1, 8)]
    assert lookup.odds.is_copying and lookup.odds.chance > 0.8


def test_drafts_do_not_slow_others_by_more_than_a_tenth() -> None:
    odds = Odds()
    for _ in range(9):
        odds.checked(7, 7)
    for rows, drafting, cost, most in (
        (2, 1, 0.02, 7),
        (2, 1, 0.1, 1),
        (2, 1, 0.2, 0),
        (2, 2, 0.02, 30),
        (8, 1, 0.001, 15),
        (8, 1, 0.5, 0),
    ):
        costs = Costs(rows)
        for _ in range(3):
            costs.plain(1.0)
        for drafted in (1, 3, 7, 15, 30):
            for _ in range(5):
                costs.checked(drafted, 100, 1 + cost * drafted)
        plan = costs.plan([(odds, 15)] * drafting)
        assert sum(plan) <= most, (rows, cost, plan)
        assert drafting == rows or 1 + cost * sum(plan) <= 1.1
        assert bool(sum(plan)) == bool(most) == costs.may_pay(drafting)


def test_what_drafts_lose_among_several_is_bounded() -> None:
    """With guesses that are never right, and the clock of an imagined machine."""
    costs, seconds, steps = Costs(3), 0.0, 400
    for _ in range(steps):
        odds = Odds()  # each answer hopes anew
        plan = costs.plan([(odds, 15), (odds, 15)])
        spent = 1 + 0.1 * sum(plan)
        costs.checked(sum(plan), 3, spent) if any(plan) else costs.plain(spent)
        seconds += spent
    assert steps < seconds < steps * 1.03
