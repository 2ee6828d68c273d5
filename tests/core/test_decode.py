"""Ids to ids: any cutting and any reuse gives the same tokens."""

from __future__ import annotations

from array import array

import mlx.core as mx
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from models import small_config, small_model
from values import number

import m7mlx.decode
from m7mlx import Mistral, Sampling
from m7mlx.decode import decode, prefill, reuse, shared_start
from m7mlx.sampling import Sampler

MODELS = {window: small_model(small_config(sliding_window=window)) for window in (5, None)}
PROMPT = [(5 * i + 2) % 97 for i in range(33)]


def greedy(model: Mistral, ids: list[int], count: int) -> list[int]:
    """Decode without a cache: the whole sequence anew for each token."""
    sequence = list(ids)
    for _ in range(count):
        sequence.append(int(number(mx.argmax(model(mx.array([sequence]))[0, -1]))))
    return sequence[len(ids) :]


@pytest.mark.parametrize("window", MODELS)
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_greedy_decoding_is_the_plain_argmax(window: int | None, chunk: int) -> None:
    model = MODELS[window]
    cache = model.new_cache()
    logits = prefill(model, PROMPT, cache, chunk)
    found = list(decode(model, logits, cache, Sampler(Sampling()), 40))
    assert found == greedy(model, PROMPT, 40)
    assert cache.ids == PROMPT + found
    assert cache.offset == len(cache.ids)


@given(st.sampled_from([5, None]), st.data())
@settings(max_examples=examples(15), deadline=None)
def test_reuse_never_changes_the_answer(window: int | None, data: st.DataObject) -> None:
    """A cache that has seen other prompts before gives what a new one gives."""
    model = MODELS[window]
    used = model.new_cache(slack=3)
    base = data.draw(st.lists(st.integers(0, 96), min_size=1, max_size=30), label="base")
    for _ in range(3):
        keep = data.draw(st.integers(0, len(base)), label="keep")
        ids = base[:keep] + data.draw(st.lists(st.integers(0, 96), min_size=1, max_size=9), label="more")
        reused = reuse(used, ids)
        assert reused < len(ids)
        logits = prefill(model, ids[reused:], used, chunk=4)
        fresh = model.new_cache()
        expected = prefill(model, ids, fresh)
        assert mx.allclose(logits, expected, rtol=1e-4, atol=1e-4).item()
        base = ids + list(decode(model, logits, used, Sampler(Sampling()), data.draw(st.integers(0, 4), label="n")))
        assert used.ids == base


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40), st.integers(1, 9))
@settings(deadline=None)
def test_starts_are_compared_many_ids_at_a_time(a: list[int], b: list[int], at_once: int) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m7mlx.decode, "_COMPARED", at_once)
        assert shared_start(a, b) == shared_start(array("i", a), b) == expected
