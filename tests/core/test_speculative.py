"""Speculative decoding: the tokens of plain decoding, whatever is guessed.

It is never much slower.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from models import mixed_config, small_config, small_model, write_folder
from values import number

from m7mlx.cache import RollingCache
from m7mlx.decode import decode, prefill
from m7mlx.errors import InputError
from m7mlx.generation import generate, stream_generate
from m7mlx.loading import load
from m7mlx.model import Mistral
from m7mlx.pace import MAX_DRAFT, Pace
from m7mlx.sampling import Sampler, Sampling
from m7mlx.speculative import Drafter, DraftModel, PromptLookup, load_draft_model, speculate
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("computed_by")

MODELS: dict[int | str | None, Mistral] = {
    window: small_model(small_config(sliding_window=window, head_dim=32)) for window in (4, 7, 16, None)
}
MODELS["mixed"] = small_model(mixed_config(head_dim=32))
OTHER = small_model(small_config(sliding_window=5, n_layers=1), seed=0)
PADDED = small_model(small_config(vocab_size=128, n_layers=1), seed=3)
SHORT = small_model(small_config(vocab_size=60, sliding_window=None, n_layers=1), seed=4)
IDS = [(i * i + 3 * i) % 97 for i in range(50)]


class Always(Pace):
    """Drafts whenever it may."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.log: list[tuple[int, int]] = []

    def plan(self, most: int) -> int:
        return max(0, min(self.most, most))

    def checked(self, drafted: int, accepted: int, seconds: float) -> None:
        self.log.append((drafted, accepted))


class Oracle:
    """Knows the answer, and is right as often as told."""

    def __init__(self, answer: list[int], wrong: Sequence[int] = ()) -> None:
        self.pace: Pace = Always(7)
        self.answer, self.wrong, self.start = answer, wrong, 0

    def begin(self, ids: Sequence[int]) -> None:
        self.start = len(ids)

    def promising(self, ids: Sequence[int]) -> bool:
        return True

    def draft(self, ids: Sequence[int], token: int, most: int, sampler: Sampler) -> list[int]:
        at = len(ids) - self.start + 1
        return [(t + (at + i in self.wrong)) % 97 for i, t in enumerate(self.answer[at : at + most])]


def plain(model: Mistral, ids: list[int], sampling: Sampling, limit: int, **options: Any) -> list[int]:
    cache = model.new_cache(**options)
    return list(decode(model, _ready(model, ids, cache, sampler := _sampler(sampling, ids)), cache, sampler, limit))


def fast(
    model: Mistral, ids: list[int], sampling: Sampling, limit: int, drafter: Drafter, **options: Any
) -> tuple[list[int], RollingCache]:
    cache = model.new_cache(**options)
    sampler = _sampler(sampling, ids)
    found = list(speculate(model, _ready(model, ids, cache, sampler), cache, sampler, limit, drafter))
    return found, cache


def _sampler(sampling: Sampling, ids: list[int]) -> Sampler:
    sampler = Sampler(sampling)
    sampler.see(ids)
    return sampler


def _ready(model: Mistral, ids: list[int], cache: RollingCache, sampler: Sampler) -> mx.array:
    return prefill(model, ids, cache, chunk=16)


def drafter_of(kind: str, most: int) -> Drafter:
    drafters: dict[str, Callable[[], Drafter]] = {
        "lookup": PromptLookup,
        "model": lambda: DraftModel(OTHER, 97),
        "padded": lambda: DraftModel(PADDED, 97),
        "short": lambda: DraftModel(SHORT, 97),
    }
    drafter = drafters[kind]()
    drafter.pace = Always(most)
    return drafter


SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.8, seed=3),
    Sampling(temperature=1.0, top_p=0.9, top_k=20, repetition_penalty=1.3, repetition_context=5, seed=4),
]


@given(
    window=st.sampled_from(list(MODELS)),
    kind=st.sampled_from(["lookup", "model", "padded", "short"]),
    most=st.integers(1, MAX_DRAFT),
    slack=st.integers(0, 20),
    sampling=st.sampled_from(SAMPLINGS),
    prompt=st.integers(1, 50),
    limit=st.integers(0, 40),
)
@settings(max_examples=examples(25), deadline=None)
def test_the_tokens_are_those_of_plain_decoding(
    window: int | str | None, kind: str, most: int, slack: int, sampling: Sampling, prompt: int, limit: int
) -> None:
    model, ids = MODELS[window], IDS[:prompt]
    expected = plain(model, ids, sampling, limit, slack=slack)
    found, cache = fast(model, ids, sampling, limit, drafter_of(kind, most), slack=slack)
    assert found == expected
    assert cache.ids == ids + expected
    assert cache.offset == len(cache.ids)


@given(
    window=st.sampled_from(list(MODELS)),
    wrong=st.lists(st.integers(0, 60)),
    options=st.sampled_from([{}, {"kv_bits": 8, "kv_group_size": 32}]),
    sampling=st.sampled_from(SAMPLINGS),
)
@settings(max_examples=examples(12), deadline=None)
def test_right_and_wrong_guesses_in_any_order(
    window: int | str | None, wrong: list[int], options: dict[str, Any], sampling: Sampling
) -> None:
    """Across the wrap, in 16 and in 8 bits, with and without a window."""
    expected = plain(MODELS[window], IDS, sampling, 60, **options)
    drafter = Oracle(expected, wrong)
    found, _ = fast(MODELS[window], IDS, sampling, 60, drafter, **options)
    assert found == expected
    assert isinstance(drafter.pace, Always)
    if not wrong:
        assert all(accepted == drafted for drafted, accepted in drafter.pace.log)
        assert len(drafter.pace.log) >= 7  # 8 tokens a pass


def test_in_a_bounded_stream_too() -> None:
    options = {"max_kv_size": 12, "sinks": 3}
    expected = plain(MODELS[None], IDS, Sampling(), 60, **options)
    assert fast(MODELS[None], IDS, Sampling(), 60, Oracle(expected, [9, 20]), **options)[0] == expected


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    for sampling in SAMPLINGS:
        drafter = DraftModel(MODELS[7], 97)
        drafter.pace = pace = Always(7)
        fast(MODELS[7], IDS, sampling, 50, drafter)
        assert pace.log
        assert all(drafted == accepted for drafted, accepted in pace.log)


def test_a_repetition_is_looked_up() -> None:
    quoted = IDS[:40]
    drafter = PromptLookup()
    drafter.begin([*quoted, 1, 2, *quoted[:9]])
    assert drafter.promising([*quoted, 1, 2, *quoted[:9]])
    assert drafter.draft([*quoted, 1, 2, *quoted[:9]], quoted[9], 5, Sampler(Sampling())) == quoted[10:15]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 8), st.integers(0, 8))
@settings(max_examples=examples(100), deadline=None)
def test_lookup_finds_what_a_plain_search_finds(ids: list[int], most: int, later: int) -> None:
    ids = [i * 257 for i in ids]  # bytes that repeat across ids
    drafter = PromptLookup()
    drafter.begin(ids[: len(ids) - later])
    token = 257

    def search(sequence: list[int], n: int) -> int:
        places = range(len(sequence) - n - 1, -1, -1)
        return next((i + n for i in places if sequence[i : i + n] == sequence[-n:]), -1)

    assert drafter.promising(ids) == (search(ids, 3) >= 0)
    whole = [*ids, token]
    found = next((at for n in (12, 6, 3) if (at := search(whole, n)) >= 0), -1)
    expected: list[int] = []
    for i in range(most if found >= 0 else 0):
        expected.append([*whole, *expected][found + i])
    assert drafter.draft(ids, token, most, Sampler(Sampling())) == expected


def test_stopping_early_leaves_a_cache_that_holds_what_was_yielded() -> None:
    model = MODELS[7]
    expected = plain(model, IDS, Sampling(), 60)
    for stop in range(1, 30):
        cache = model.new_cache()
        sampler = Sampler(Sampling())
        stream = speculate(model, prefill(model, IDS, cache), cache, sampler, None, Oracle(expected, [13]))
        assert list(itertools.islice(stream, stop)) == expected[:stop]
        stream.close()
        assert cache.ids == IDS + expected[:stop]
        assert cache.offset == len(cache.ids)
        logits = model(mx.array([[expected[stop]]]), cache)
        assert mx.argmax(logits[0, 0]).item() == expected[stop + 1]


# --- the distribution -----------------------------------------------------------------------------


def chi_squared(counts: Counter[int], expected: Sequence[float], draws: int) -> float:
    return sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(expected))


def test_what_is_sampled_follows_the_target_and_the_naive_rule_does_not() -> None:
    """Draw from a vocabulary of 6 with a draft that is wrong on purpose.

    99.99 % of true samples stay below 25.7.
    """
    rng = np.random.default_rng(5)
    target, guess = (mx.array(rng.standard_normal((1, 1, 6)) * 1.2) for _ in range(2))
    p, q = (np.array(mx.softmax(x[0, 0])) for x in (target, guess))
    draws, kept, exact, naive = 6000, 0, Counter[int](), Counter[int]()
    chance = random.Random(1)
    for seed in range(draws):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        drafted = int(number(sampler.fork()(guess[:, 0])))
        chosen = int(number(sampler.preview(target, [])))
        kept += drafted == chosen
        exact[chosen] += 1
        # The naive rule: keep a draft by min(1, p/q), but replace it by a plain draw from p.
        keep = chance.random() < min(1.0, p[drafted] / q[drafted])
        naive[drafted if keep else chance.choices(range(6), p.tolist())[0]] += 1
    assert chi_squared(exact, p.tolist(), draws) < 25.7
    assert chi_squared(naive, p.tolist(), draws) > 100
    # The same noise for both makes them agree more often than two independent draws would.
    assert kept / draws > float((p * q).sum()) * 1.2


def test_sequences_follow_the_target() -> None:
    """Two tokens after a prompt, drafted by another model, have the right joint distribution.

    It is one over 3 × 3 tokens.
    """
    config = small_config(vocab_size=3, n_layers=1)
    model, other = small_model(config, seed=1), small_model(config, seed=2)
    first = np.array(mx.softmax(model(mx.array([[0, 1]]))[0, -1] / 2))
    joint = np.array([first[a] * np.array(mx.softmax(model(mx.array([[0, 1, a]]))[0, -1] / 2)) for a in range(3)])
    counts: Counter[int] = Counter()
    draws, base = examples(500), model.new_cache()
    logits = prefill(model, [0, 1], base)
    start = base.snapshot()
    for seed in range(draws):
        base.restore(start)
        drafter = DraftModel(other, 3)
        drafter.pace = Always(3)
        sampler = Sampler(Sampling(temperature=2.0, seed=seed))
        a, b = list(speculate(model, logits, base, sampler, 4, drafter))[:2]
        counts[a * 3 + b] += 1
    assert chi_squared(counts, joint.reshape(-1).tolist(), draws) < 31.8  # 99.99 % for 8 degrees of freedom


# --- whole answers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a smaller one with the same tokenizer."""
    config = small_config(vocab_size=32768, sliding_window=None, n_layers=1)
    return model_folder, write_folder(tmp_path_factory.mktemp("draft") / "draft", config)


def test_generate_gives_the_same_text(pair: tuple[Path, Path]) -> None:
    model, tokenizer = load(pair[0])
    prompt = "one two three four " * 8
    expected = generate(model, tokenizer, prompt, max_tokens=40)
    for drafter in (PromptLookup(), load_draft_model(pair[1], model, tokenizer)):
        drafter.pace = Always(5)
        cache = model.new_cache()
        pieces = list(stream_generate(model, tokenizer, prompt, max_tokens=40, drafter=drafter, cache=cache))
        assert "".join(p.text for p in pieces) == expected
        again = generate(model, tokenizer, prompt, max_tokens=40, drafter=drafter, cache=cache)
        assert again == expected  # the drafter follows a cache that was rolled back or begun anew


def test_a_stop_inside_a_draft_leaves_a_whole_cache(pair: tuple[Path, Path]) -> None:
    model, tokenizer = load(pair[0])
    whole = generate(model, tokenizer, "one two", max_tokens=40)
    drafter = PromptLookup()
    drafter.pace = Always(15)
    cache = model.new_cache()
    text = generate(model, tokenizer, "one two", max_tokens=40, stop=[whole[20:24]], drafter=drafter, cache=cache)
    assert text == whole[: whole.index(whole[20:24])]
    assert cache.offset == len(cache.ids)


def test_a_draft_model_with_other_tokens_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, mistral_tokenizers: dict[str, Tokenizer]
) -> None:
    model, _ = load(pair[0])
    other = write_folder(tmp_path / "v1", small_config(vocab_size=32000, n_layers=1))
    with pytest.raises(InputError, match="another tokenizer"):
        load_draft_model(other, model, load_tokenizer(pair[0]))
