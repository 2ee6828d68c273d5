"""Sampling: the distribution of mlx-lm for the same settings.

Seeds are a request's own, and values out of range are refused.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors
from values import number

from m7mlx.errors import InputError
from m7mlx.sampling import Sampler, Sampling, filtered_logprobs, penalize, penalize_chosen

logit_lists = st.lists(st.integers(-400, 400), min_size=8, max_size=8, unique=True).map(
    lambda xs: [x / 40 for x in xs]
)


# Few values: mlx-lm compiles its filters anew for each.
@given(
    logit_lists, st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.05, 0.5]), st.sampled_from([0, 1, 3, 10])
)
@settings(max_examples=examples(60), deadline=None)
def test_filters_keep_what_mlx_lm_keeps(logits: list[float], top_p: float, min_p: float, top_k: int) -> None:
    row = mx.array([logits])
    found = filtered_logprobs(row, Sampling(temperature=1, top_p=top_p, min_p=min_p, top_k=top_k))
    expected = row - mx.logsumexp(row, axis=-1, keepdims=True)
    if top_p < 1:
        expected = apply_top_p(expected, top_p)
    if min_p > 0:
        expected = apply_min_p(expected, min_p)
    if 0 < top_k < len(logits):
        expected = apply_top_k(expected, top_k)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5)
    assert mx.isfinite(found).any().item()


def test_a_tiny_top_p_keeps_the_best_token() -> None:
    kept = filtered_logprobs(mx.array([[0.0, 3.0, 1.0]]), Sampling(temperature=1, top_p=1e-9))
    assert mx.isfinite(kept).tolist() == [[False, True, False]]


def test_greedy_takes_the_most_probable_token_whatever_the_filters() -> None:
    logits = mx.array([[0.1, 2.0, 1.9, -5.0]])
    assert Sampler(Sampling(top_p=0.1, top_k=1, min_p=0.9))(logits).tolist() == [1]


def test_frequencies_follow_the_tempered_distribution() -> None:
    logits = mx.array([[1.0, 0.0, 2.0, -1.0]])
    sampler = Sampler(Sampling(temperature=0.7, seed=1))
    draws = 4000
    counts = Counter(sampler(logits).item() for _ in range(draws))
    expected = np.array(mx.softmax(logits / 0.7, axis=-1))[0]
    for token, probability in enumerate(expected):
        spread = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[token] - draws * probability) < 5 * spread


def test_a_seed_repeats_and_leaves_the_global_state_alone() -> None:
    logits = mx.zeros((1, 1000))

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1, seed=seed))
        return [int(number(sampler(logits))) for _ in range(8)]

    mx.random.seed(3)
    before = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    first = draw(7)
    assert mx.random.uniform(shape=(4,)).tolist() == before
    assert draw(7) == first
    assert draw(8) != first
    assert draw(None) != draw(None)
    assert draw((1 << 64) - 1) == draw((1 << 64) - 1)


@given(logit_lists, st.lists(st.integers(0, 3), min_size=1, max_size=6), st.sampled_from([1.1, 1.7]))
@settings(max_examples=examples(25), deadline=None)
def test_the_repetition_penalty_is_mlx_lms(logits: list[float], recent: list[int], penalty: float) -> None:
    row = mx.array([logits])
    (process,) = make_logits_processors(repetition_penalty=penalty)
    expected = np.array(process(mx.array(recent), mx.array([logits])))
    np.testing.assert_allclose(np.array(penalize(row, mx.array(recent), penalty)), expected, rtol=1e-5)
    assert row.tolist() == mx.array([logits]).tolist()


def test_the_penalty_sees_the_prompt_and_what_was_generated_and_forgets() -> None:
    sampler = Sampler(Sampling(repetition_penalty=10, repetition_context=2))
    sampler.see([3, 0, 1])  # 3 is out of the context already
    logits = mx.array([[5.0, 4.9, 4.8, 5.1]])
    assert [sampler(logits).item() for _ in range(4)] == [3, 0, 1, 3]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 1.5},
        {"top_p": -1},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_context": -1},
        {"seed": -1},
        {"seed": 1 << 64},
        {"temperature": "hot"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling(**bad)


def test_what_the_answer_holds_is_made_less_likely() -> None:
    """By OpenAI's formula: μ − c · frequency − (c > 0) · presence, c counted in the answer."""
    logits = mx.array([[1.0, 2.0, 3.0, 4.0]])
    found = penalize_chosen(logits, mx.array([3, 1, 3]), 0.5, 0.25)
    assert np.allclose(np.array(found), [[1.0, 2.0 - 0.75, 3.0, 4.0 - 1.0]])
    for presence, frequency, wanted in ((0.0, 0.6, [3, 3, 2, 3, 2, 3]), (1.5, 0.0, [3, 2, 3, 3, 3, 3])):
        sampler = Sampler(Sampling(presence_penalty=presence, frequency_penalty=frequency))
        sampler.see([3, 3, 3, 3])  # a prompt is not counted
        assert not sampler.is_greedy
        assert [sampler(logits).item() for _ in wanted] == wanted
        ahead = Sampler(Sampling(presence_penalty=presence, frequency_penalty=frequency))
        ahead.see([3])
        assert ahead.preview(mx.stack([logits] * 3, axis=1), wanted[:2]).tolist() == wanted[:3]
        gone_on = Sampler(Sampling(presence_penalty=presence, frequency_penalty=frequency))
        gone_on.see([3, 3, *wanted[:2]], chosen=2)
        assert gone_on(logits).item() == wanted[2]
