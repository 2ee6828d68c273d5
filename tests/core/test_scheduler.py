"""The scheduler: everybody gets the answer that they would get alone, however many come and go."""

from __future__ import annotations

from array import array
from collections import defaultdict
from typing import Any

import mlx.core as mx
import pytest
from alone import alone as pieces_alone
from alone import prompt
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import random_weights, small_config, small_model

import m7mlx.answer
import m7mlx.batch
import m7mlx.sampling
import m7mlx.scheduler
from m7mlx import Piece, Request, stream_generate
from m7mlx.constrain import Unconstrained
from m7mlx.decode import shared_start
from m7mlx.errors import InputError, PromptTooLongError, RunError, TokenizerError
from m7mlx.loading import build
from m7mlx.rows import Told
from m7mlx.sampling import Sampling
from m7mlx.scheduler import Scheduler
from m7mlx.scoring import score
from m7mlx.tokens.tokenizer import Tokenizer

MODELS = {window: small_model(small_config(vocab_size=32000, sliding_window=window)) for window in (7, None)}


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return mistral_tokenizers["v1"]


def alone(
    model: Any, tokenizer: Tokenizer, request: Request, max_kv_size: int | None = None
) -> tuple[str, list[int], str]:
    pieces = pieces_alone(model, tokenizer, request, max_kv_size)
    assert pieces[-1].finish_reason is not None
    return "".join(p.text for p in pieces), [i for p in pieces for i in p.ids], pieces[-1].finish_reason


class Clients:
    """Collects the pieces of a scheduler's answers by request."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.pieces: dict[int, list[Piece]] = defaultdict(list)

    def take(self, told: Told) -> None:
        for number, piece in told:
            assert not self.pieces[number] or self.pieces[number][-1].finish_reason is None
            self.pieces[number].append(piece)

    def step(self) -> bool:
        told, more = self.scheduler.step()
        self.take(told)
        return more

    def run(self) -> None:
        while self.step():
            pass

    def answer(self, number: int) -> tuple[str, list[int], str | None]:
        pieces = self.pieces[number]
        return "".join(p.text for p in pieces), [i for p in pieces for i in p.ids], pieces[-1].finish_reason

    def reused(self, number: int) -> int:
        stats = self.pieces[number][-1].stats
        assert stats is not None
        return stats.reused_tokens


arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps until the next one comes
        st.integers(1, 40),  # tokens of the prompt
        st.integers(1, 20),  # tokens wanted
        st.sampled_from([Sampling(), Sampling(temperature=0.9, seed=3, top_k=4), Sampling(repetition_penalty=1.3)]),
        st.integers(-3, 25),  # cancelled after so many steps; below 0 never
    ),
    min_size=1,
    max_size=9,
)


@given(arrivals, st.sampled_from([(7, None), (None, None), (None, 11)]), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=examples(10), deadline=None, suppress_health_check=list(HealthCheck))
def test_everybody_is_answered_as_if_alone(
    tokenizer: Tokenizer,
    coming: list[tuple[int, int, int, Sampling, int]],
    bounds: tuple[int | None, int | None],
    rows: int,
    kept: int,
) -> None:
    """In a window, with everything in sight, or with sinks and the last keys."""
    window, max_kv_size = bounds
    model = MODELS[window]
    clients = Clients(Scheduler(model, tokenizer, rows=rows, kept=kept, max_kv_size=max_kv_size))
    requests: dict[int, Request] = {}
    leaving: dict[int, int] = {}
    for seed, (wait, length, wanted, sampling, stays) in enumerate(coming):
        for _ in range(wait):
            clients.step()
            for number in [n for n, left in leaving.items() if left == 0]:
                piece = clients.scheduler.cancel(number)
                clients.take([(number, piece)] if piece else [])
            leaving = {n: left - 1 for n, left in leaving.items() if left > 0}
            assert clients.scheduler.running_and_waiting[0] <= rows
        request = Request(prompt(seed % 3, length), sampling, wanted)  # some begin like others
        number = clients.scheduler.add(request)
        requests[number] = request
        if stays >= 0:
            leaving[number] = stays
    clients.run()
    for number, request in requests.items():
        text, ids, reason = alone(model, tokenizer, request, max_kv_size)
        found = clients.answer(number)
        if found[2] == "cancelled":
            assert found[1] == ids[: len(found[1])]
        else:
            assert found == (text, ids, reason)
        stats = clients.pieces[number][-1].stats
        assert stats is not None
        assert (stats.prompt_tokens, stats.generated_tokens) == (len(request.ids), len(found[1]))


def test_a_long_prompt_does_not_stall_the_others(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m7mlx.scheduler, "default_chunk", lambda model: 10)
    clients = Clients(Scheduler(MODELS[7], tokenizer, rows=3))
    first = clients.scheduler.add(Request(prompt(1, 5), max_tokens=60))
    clients.step()
    long = clients.scheduler.add(Request(prompt(2, 300), max_tokens=5))
    clients.step()
    short = clients.scheduler.add(Request(prompt(3, 8), max_tokens=5))
    before = len(clients.pieces[first])
    for step in range(1, 20):
        clients.step()
        assert len(clients.pieces[first]) == before + step  # a token in every step
    assert not clients.pieces[long]
    assert clients.answer(short)[2] == "length"  # it did not wait for the long one either
    clients.run()
    assert clients.answer(long) == alone(MODELS[7], tokenizer, Request(prompt(2, 300), max_tokens=5))


@pytest.mark.parametrize("window", [7, None])
def test_what_was_read_before_is_not_read_again(tokenizer: Tokenizer, window: int | None) -> None:
    model = MODELS[window]
    clients = Clients(Scheduler(model, tokenizer, rows=2, kept=3))
    opening = prompt(1, 50)
    first = clients.scheduler.add(Request(opening, max_tokens=6))
    clients.run()
    held = opening + clients.answer(first)[1]
    second = Request([*held, *prompt(9, 7)], max_tokens=4)
    number = clients.scheduler.add(second)
    other = clients.scheduler.add(Request([*opening, 5, 6], max_tokens=4))
    clients.run()
    assert clients.answer(number) == alone(model, tokenizer, second)
    assert clients.answer(other) == alone(model, tokenizer, Request([*opening, 5, 6], max_tokens=4))
    reused = [clients.reused(n) for n in (first, number, other)]
    assert reused == [0, len(held), len(opening)]
    assert len(clients.scheduler._kept) == 2  # the first is a part of the second


def test_what_one_space_has_read_is_of_no_use_to_another(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is kept nor what is being read, and none takes the other's place."""
    monkeypatch.setattr(m7mlx.scheduler, "default_chunk", lambda model: 10)
    clients = Clients(Scheduler(MODELS[None], tokenizer, rows=4, kept=4))
    opening = prompt(1, 50)
    numbers = []
    for spaces in ("ab", "ab"):
        numbers += [clients.scheduler.add(Request(opening, max_tokens=2, space=space)) for space in spaces]
        clients.run()
    assert [clients.reused(n) for n in numbers] == [0, 0, 49, 49]
    assert {ended.space for ended in clients.scheduler._kept} == {"a", "b"}
    assert Request.from_dict(Request(opening, space="a").to_dict()).space == "a"


@pytest.mark.parametrize("window", [7, None])
def test_what_is_being_read_is_read_once_for_all_that_begin_with_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """A shared start is read once, to within a chunk of where the prompts part.

    A ring that has turned cannot go back, so they go on by themselves before they part.
    """
    monkeypatch.setattr(m7mlx.scheduler, "default_chunk", lambda model: 10)
    model = MODELS[window]
    opening = prompt(1, 95)
    requests = [Request([*opening, *prompt(5 + i, 12 + i)], max_tokens=5) for i in range(6)]
    requests.append(Request(prompt(4, 30), max_tokens=5))  # has nothing to wait for
    clients = Clients(Scheduler(model, tokenizer, rows=5, kept=0, slack=2))
    numbers = [clients.scheduler.add(request) for request in requests]
    clients.run()
    for number, request in zip(numbers, requests, strict=True):
        assert clients.answer(number) == alone(model, tokenizer, request)
    reused = [clients.reused(n) for n in numbers]
    assert reused[0] == reused[6] == 0
    assert all(len(opening) - 10 <= n <= len(opening) for n in reused[1:5])


def test_a_start_stays_where_what_goes_on_from_it_cannot_go_back(tokenizer: Tokenizer) -> None:
    clients = Clients(Scheduler(MODELS[7], tokenizer, rows=1, kept=2, slack=2))
    opening = prompt(1, 6)
    clients.scheduler.add(Request(opening, max_tokens=1))
    clients.run()
    for _ in range(2):
        number = clients.scheduler.add(Request([*opening, *prompt(9, 30)], max_tokens=4))
        clients.run()
        assert clients.reused(number) >= len(opening)
        other = clients.scheduler.add(Request([*opening, *prompt(8, 30)], max_tokens=4))
        clients.run()
        assert clients.reused(other) >= len(opening)


def test_one_that_fails_fails_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[7]
    clients = Clients(Scheduler(model, tokenizer, rows=3))
    good = clients.scheduler.add(Request(prompt(1, 5), max_tokens=12))
    clients.step()
    hidden = type(model).hidden

    def broken(self: Any, ids: mx.array, cache: Any = None) -> mx.array:
        if ids.shape[1] == 9:
            raise RuntimeError("[malloc] Unable to allocate")
        return hidden(self, ids, cache)

    monkeypatch.setattr(type(model), "hidden", broken)
    bad = clients.scheduler.add(Request(prompt(2, 9), max_tokens=4))
    late = clients.scheduler.add(Request(prompt(3, 6), max_tokens=4))
    clients.run()
    assert clients.answer(bad)[2] == "failed"
    assert "malloc" in str(clients.pieces[bad][-1].error)
    for number, request in (
        (good, Request(prompt(1, 5), max_tokens=12)),
        (late, Request(prompt(3, 6), max_tokens=4)),
    ):
        assert clients.answer(number) == alone(model, tokenizer, request)


def test_a_pass_that_fails_ends_those_in_it_and_nobody_else(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = Clients(Scheduler(MODELS[7], tokenizer, rows=2))
    numbers = [clients.scheduler.add(Request(prompt(i, 5), max_tokens=9)) for i in range(3)]
    for _ in range(4):
        clients.step()
    rows = clients.scheduler._rows
    real = rows._step
    monkeypatch.setattr(rows, "_step", lambda *_: (_ for _ in ()).throw(RuntimeError("device lost")))
    clients.step()
    monkeypatch.setattr(rows, "_step", real)
    clients.run()
    assert [clients.answer(n)[2] for n in numbers] == ["failed", "failed", "length"]
    assert clients.answer(numbers[2]) == alone(MODELS[7], tokenizer, Request(prompt(2, 5), max_tokens=9))


def test_rows_are_given_back(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(MODELS[7], tokenizer, rows=4, kept=0)
    clients = Clients(scheduler)
    for i, wanted in enumerate((3, 3, 3, 30)):
        scheduler.add(Request(prompt(i, 5), max_tokens=wanted))
    assert scheduler.running_and_waiting == (0, 4)
    for _ in range(12):
        clients.step()
    batch = scheduler._rows.batch
    assert batch is not None
    assert (len(batch), scheduler.running_and_waiting) == (1, (1, 0))
    clients.run()
    assert scheduler._rows.batch is None
    assert scheduler.step() == ([], False)


def test_requests_that_make_no_sense_are_refused_at_once(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(MODELS[None], tokenizer)
    refused: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"prompt": []}, InputError),
        ({"prompt": [40_000]}, TokenizerError),
        ({"prompt": [1] * 5000}, PromptTooLongError),
        ({"prompt": [1], "max_tokens": 0}, InputError),
        ({"prompt": [1], "stop": ("",)}, InputError),
    ]
    for request, error in refused:
        with pytest.raises(error):
            scheduler.add(Request(**request))
    assert scheduler.running_and_waiting == (0, 0)
    assert scheduler.cancel(1) is None
    for bad in ({"rows": 0}, {"kept": -1}):
        with pytest.raises(InputError):
            Scheduler(MODELS[7], tokenizer, **bad)


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer: Tokenizer) -> None:
    model = small_model(small_config(vocab_size=32000, sliding_window=None, max_position_embeddings=32))
    clients = Clients(Scheduler(model, tokenizer))
    with pytest.raises(PromptTooLongError, match="32 tokens and leaves no room for an answer"):
        clients.scheduler.add(Request(prompt(1, 32)))
    assert clients.scheduler.running_and_waiting == (0, 0)
    last = clients.scheduler.add(Request(prompt(1, 31)))
    clients.run()
    assert clients.answer(last) == alone(model, tokenizer, Request(prompt(1, 31), max_tokens=1))


def test_no_token_is_made_where_none_is_wanted(tokenizer: Tokenizer) -> None:
    clients = Clients(Scheduler(MODELS[7], tokenizer))
    none = clients.scheduler.admit(Request(prompt(1, 5), max_tokens=0))
    assert not clients.step()
    assert clients.answer(none) == ("", [], "length")


@pytest.mark.parametrize("window", [7, None])
def test_prompts_are_scored_as_texts_are(tokenizer: Tokenizer, window: int | None) -> None:
    """Whatever the chunks, and beside others: the log probabilities of `m7mlx.scoring`."""
    model = MODELS[window]
    clients = Clients(Scheduler(model, tokenizer, rows=3))
    clients.scheduler.add(Request(prompt(4, 20), max_tokens=30))
    lengths = {1: 0, 2: 0, 150: 3, 401: 0}
    asked = {
        clients.scheduler.add(Request(prompt(4, n), max_tokens=wanted, prompt_logprobs=2)): (n, wanted)
        for n, wanted in lengths.items()
    }
    clients.run()
    for number, (n, wanted) in asked.items():
        scored = [one for piece in clients.pieces[number] for one in piece.prompt]
        assert [one.id for one in scored] == prompt(4, n)[1:]
        assert len([i for piece in clients.pieces[number] for i in piece.ids]) == wanted
        assert clients.pieces[number][-1].finish_reason == "length"
        if n > 1:
            expected = score(model, prompt(4, n))
            assert [one.logprob for one in scored] == pytest.approx(expected.logprobs.tolist(), abs=1e-4)
            assert all(len(one.top) == 2 and one.top[0][1] >= one.top[1][1] for one in scored)
            assert [one.top[0][0] == one.id for one in scored] == expected.greedy.tolist()


def test_a_grammar_that_fails_fails_its_own_answer(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = iter([True, True, False])

    class Broken(Unconstrained):
        def mask(self, vocab_size: int) -> mx.array:
            if next(masks):
                return mx.ones((vocab_size,), mx.bool_)
            raise RunError("the grammar of this answer failed: too complex")

    clients = Clients(Scheduler(MODELS[7], tokenizer, rows=2))
    bad = clients.scheduler.add(Request(prompt(1, 5), max_tokens=9, constraint=Broken()))
    good = clients.scheduler.add(Request(prompt(2, 5), max_tokens=9))
    clients.run()
    assert clients.answer(bad)[2] == "failed"
    assert "too complex" in str(clients.pieces[bad][-1].error)
    assert clients.answer(good) == alone(MODELS[7], tokenizer, Request(prompt(2, 5), max_tokens=9))


@pytest.mark.parametrize("wanted", [3, 4])
def test_a_failure_after_the_last_token_is_of_no_account(tokenizer: Tokenizer, wanted: int) -> None:
    calls = iter(range(3))

    def good_for_three(ids: mx.array, logits: mx.array) -> mx.array:
        next(calls)
        return logits

    clients = Clients(Scheduler(MODELS[7], tokenizer))
    number = clients.scheduler.add(Request(prompt(1, 5), max_tokens=wanted, logits_processors=[good_for_three]))
    clients.run()
    if wanted == 3:
        assert clients.answer(number) == alone(MODELS[7], tokenizer, Request(prompt(1, 5), max_tokens=3))
    else:
        assert clients.answer(number)[2] == "failed"
        assert isinstance(clients.pieces[number][-1].error, StopIteration)


@pytest.mark.parametrize(
    ("owner", "name", "lost"),
    [
        (m7mlx.answer.Answer, "take", {"first"}),
        (m7mlx.answer.StopFilter, "add", {"first"}),
        (m7mlx.sampling.Sampler, "__call__", {"second"}),
        (m7mlx.batch.BatchCache, "row", set()),  # its conversation is not kept, that is all
        (m7mlx.batch.BatchCache, "put", {"late"}),
        (m7mlx.batch.BatchCache, "join", {"second"}),
        (m7mlx.batch.BatchCache, "keep", {"second", "first"}),  # of all that are laid out anew
    ],
)
def test_whatever_fails_ends_no_more_than_it_must(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, lost: set[str]
) -> None:
    """The scheduler goes on after an error that nobody foresees.

    One call of the function fails; what is not lost with it is answered as if alone.
    """
    model = MODELS[7]
    sampling = Sampling(temperature=0.8, seed=5)
    asked = {
        "first": Request(prompt(1, 5), sampling, 24, stop=("zzz",)),
        "second": Request(prompt(2, 5), max_tokens=6),
        "third": Request(prompt(4, 5), max_tokens=4),
        "late": Request(prompt(3, 6), max_tokens=9),
    }
    expected = {key: alone(model, tokenizer, request) for key, request in asked.items()}
    clients = Clients(Scheduler(model, tokenizer, rows=3))
    real, broken = getattr(owner, name), [True]

    def once(*args: Any, **options: Any) -> Any:
        if broken:
            broken.clear()
            raise KeyError("nobody foresees this")
        return real(*args, **options)

    def breaks() -> None:
        monkeypatch.setattr(owner, name, once)

    numbers = {"first": clients.scheduler.add(asked["first"])}
    clients.step()
    if name != "keep" and name != "put":
        breaks()
    for key in ("second", "third"):
        numbers[key] = clients.scheduler.add(asked[key])
    if name == "keep":
        breaks()
    while not clients.pieces[numbers["third"]] or clients.pieces[numbers["third"]][-1].finish_reason is None:
        clients.step()
    if name == "put":
        breaks()
    numbers["late"] = clients.scheduler.add(asked["late"])
    clients.run()
    assert not broken
    for key, number in numbers.items():
        if key in lost and clients.answer(number)[2] == "failed":
            assert isinstance(clients.pieces[number][-1].error, KeyError)
            lost = lost - {key}
        else:
            assert clients.answer(number) == expected[key], key
    assert not lost or name == "keep"
    again = clients.scheduler.add(asked["first"])
    clients.run()
    assert clients.answer(again) == expected["first"]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.5, seed=1), Sampling(repetition_penalty=1.2)]
)
def test_ids_that_the_tokenizer_does_not_have_are_never_chosen(tokenizer: Tokenizer, sampling: Sampling) -> None:
    config = small_config(vocab_size=32064, n_layers=1)
    weights = random_weights(config)
    weights["lm_head.weight"][32000:] *= 100  # they would win nearly always
    model = build(config, {name: mx.array(array) for name, array in weights.items()})
    for request in (
        Request(prompt(1, 5), sampling, 20),
        Request(prompt(2, 5), sampling, 20, logprobs=2, logit_bias={7: 1.0}),
    ):
        clients = Clients(Scheduler(model, tokenizer))
        number, other = clients.scheduler.add(request), clients.scheduler.add(Request(prompt(3, 4), max_tokens=20))
        clients.run()
        for one in (number, other):
            ids = clients.answer(one)[1]
            assert ids and max(ids) < 32000
    drafted = stream_generate(
        model, tokenizer, prompt(1, 5), sampling=sampling, max_tokens=30, drafter=m7mlx.PromptLookup()
    )
    plain = stream_generate(model, tokenizer, prompt(1, 5), sampling=sampling, max_tokens=30)
    ids = [i for piece in drafted for i in piece.ids]
    assert ids == [i for piece in plain for i in piece.ids] and max(ids) < 32000
    with pytest.raises(TokenizerError, match="logit_bias"):
        Scheduler(model, tokenizer).add(Request([1], logit_bias={32001: 100.0}))


def test_what_is_alike_is_compared_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are compared once, however many steps it takes to read them.

    Of a million ids each comparison takes milliseconds.
    """
    monkeypatch.setattr(m7mlx.scheduler, "default_chunk", lambda model: 4)
    compared: list[int] = []

    def counted(a: Any, b: Any) -> int:
        compared.append(1)
        return shared_start(a, b)

    monkeypatch.setattr(m7mlx.scheduler, "shared_start", counted)
    clients = Clients(Scheduler(MODELS[7], tokenizer, rows=8, kept=4, slack=2))
    request = Request(array("i", prompt(1, 200)), max_tokens=3)
    for _ in range(3):
        clients.scheduler.add(Request(prompt(2, 20), max_tokens=1))
        clients.run()
    for _ in range(6):
        clients.scheduler.add(request)
    compared.clear()
    clients.run()
    assert len(compared) <= 6 * 5 + 6 * 7 + 6 * 4  # with each other, with those kept, and those kept with the ended
