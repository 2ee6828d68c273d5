"""Full attention in bounded memory: the last keys and a few sinks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import reference
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_weights, small_config, small_model

from m7mlx.decode import prefill
from m7mlx.errors import InputError
from m7mlx.generation import generate
from m7mlx.tokens.tokenizer import Tokenizer

CONFIG = small_config(sliding_window=None, max_position_embeddings=64)
MODEL = small_model(CONFIG)
LENGTH = 90
IDS = [(i * i + 3 * i) % 97 for i in range(LENGTH)]
STREAMS = [(8, 0), (8, 1), (9, 4), (5, 4), (23, 3), (2, 1), (1, 0)]
EXPECTED = {
    (size, sinks): reference.logits(CONFIG, random_weights(CONFIG), IDS, size, sinks) for size, sinks in STREAMS
}


def assert_close(found: mx.array, expected: np.ndarray) -> None:
    difference = np.abs(np.array(found) - expected).max() / np.abs(expected).max()
    assert difference < 1e-4, difference


@given(st.sampled_from(STREAMS), st.integers(0, 9), st.data())
@settings(max_examples=examples(20), deadline=None)
def test_any_cutting_gives_the_logits_of_recomputed_positions(
    stream: tuple[int, int], slack: int, data: st.DataObject
) -> None:
    cache = MODEL.new_cache(slack=slack, max_kv_size=stream[0], sinks=stream[1])
    while cache.offset < LENGTH:
        start = cache.offset
        length = data.draw(st.integers(1, LENGTH - start) | st.just(1), label="length")
        found = MODEL(mx.array([IDS[start : start + length]]), cache)[0]
        assert_close(found, EXPECTED[stream][start : start + length])


@pytest.mark.parametrize("stream", STREAMS)
def test_token_by_token(stream: tuple[int, int]) -> None:
    cache = MODEL.new_cache(slack=2, max_kv_size=stream[0], sinks=stream[1])
    for i, token in enumerate(IDS):
        assert_close(MODEL(mx.array([[token]]), cache)[0, 0], EXPECTED[stream][i])


def test_as_long_as_all_fits_it_is_full_attention() -> None:
    plain = MODEL(mx.array([IDS[:60]]))
    cache = MODEL.new_cache(max_kv_size=60)
    assert mx.allclose(plain, MODEL(mx.array([IDS[:60]]), cache), atol=1e-4)


def test_memory_stays_the_same_far_past_the_context() -> None:
    cache = MODEL.new_cache(max_kv_size=32)
    prefill(MODEL, IDS[:40], cache)
    before = cache.nbytes
    # 28 slots, the slack and 4 sinks: 3 layers, keys and values, 2 heads of 16 numbers of 4 bytes
    assert before == 3 * 2 * 2 * 16 * 4 * (28 + cache.slack + 4)
    for _ in range(8):
        prefill(MODEL, IDS, cache, chunk=33)
    assert cache.offset == 40 + 8 * LENGTH
    assert cache.nbytes == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_kv_size": 4}, "above the number of sinks"),
        ({"max_kv_size": 0, "sinks": 0}, "above the number of sinks"),
        ({"max_kv_size": 10, "sinks": -1}, "above the number of sinks"),
        ({"max_kv_size": 65}, "context of 64"),
    ],
)
def test_sizes_that_cannot_be(options: dict[str, int], text: str) -> None:
    with pytest.raises(InputError, match=text):
        MODEL.new_cache(**options)


def test_a_model_with_a_window_needs_no_bound() -> None:
    with pytest.raises(InputError, match="own window bounds its cache to 7 keys"):
        small_model(small_config()).new_cache(max_kv_size=5)


def test_a_bounded_stream_has_no_end(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    model = small_model(small_config(vocab_size=32000, sliding_window=None, max_position_embeddings=40, n_layers=1))
    tokenizer = mistral_tokenizers["v1"]
    prompt = [5] * 50  # longer than the context
    cache = model.new_cache(max_kv_size=24)
    generate(model, tokenizer, prompt, cache=cache, max_tokens=30)
    assert cache.offset >= 50
