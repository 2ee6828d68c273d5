"""Log probabilities: however a text is cut, they are those of plain NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from models import random_weights, small_config, small_model

from m7mlx import scoring
from m7mlx.batch import BatchCache
from m7mlx.errors import InputError, PromptTooLongError, TokenizerError
from m7mlx.scoring import compare, log_softmax, read_logits, score, spans

CONFIG = small_config()
IDS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 41).tolist()


def plain(ids: list[int], seed: int = 0) -> np.ndarray:
    """Log probabilities [len(ids), vocab_size] in float64."""
    logits = reference.logits(CONFIG, random_weights(CONFIG, seed), ids)
    most = logits.max(-1, keepdims=True)
    probabilities: np.ndarray = logits - np.log(np.exp(logits - most).sum(-1, keepdims=True)) - most
    return probabilities


@pytest.mark.parametrize(("chunk", "positions"), [(1, 128), (3, 2), (7, 128), (13, 5), (128, 4)])
@pytest.mark.parametrize("first", [1, 2, 17, 40])
def test_scores_are_those_of_numpy_however_the_text_is_cut(
    chunk: int, positions: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "default_chunk", lambda model: chunk)
    monkeypatch.setattr(scoring, "_POSITIONS", positions)
    steps: list[int] = []
    ids = IDS.copy()
    ids[30] = int(plain(IDS)[29].argmax())  # one that is the likeliest
    found = score(small_model(CONFIG), ids, first, advance=steps.append)
    expected = plain(ids)[first - 1 : -1]
    np.testing.assert_allclose(found.logprobs, expected[np.arange(41 - first), ids[first:]], rtol=1e-4, atol=1e-4)
    assert found.greedy.tolist() == (expected.argmax(-1) == ids[first:]).tolist()
    assert first > 30 or found.greedy.any()
    assert sum(steps) == 41 - first and max(steps) <= min(chunk, positions)


@given(length=st.integers(2, 60), context=st.integers(1, 30), data=st.data())
def test_spans_score_each_token_once_with_enough_before_it(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    found = list(spans(length, context, stride))
    assert [i for span in found for i in range(span.first, span.end)] == list(range(1, length))
    for span in found:
        assert 0 <= span.start < span.first and span.end - 1 - span.start <= context
        assert span.start == 0 or span.first - span.start >= context - stride + 1
        assert span.start == 0 or span.end - 1 - span.start == context
    assert list(spans(length)) == [(0, 1, length)]
    if length <= context + 1:
        assert found == [(0, 1, length)]


@pytest.mark.parametrize(("context", "stride"), [(19, 1), (20, 2), (26, 8), (40, 40), (60, 7)])
def test_any_stride_gives_what_one_pass_gives_where_no_span_cuts(context: int, stride: int) -> None:
    """Three layers with a window of 7 reach 18 tokens back.

    Who has seen 19 has seen all that counts.
    """
    model = small_model(CONFIG)
    found = [score(model, IDS[w.start : w.end], w.first - w.start).logprobs for w in spans(len(IDS), context, stride)]
    np.testing.assert_allclose(np.concatenate(found), score(model, IDS).logprobs, atol=1e-4)


def test_a_span_that_cuts_forgets_what_it_has_not_read() -> None:
    model = small_model(CONFIG)
    span = list(spans(len(IDS), 4, 2))[3]
    found = score(model, IDS[span.start : span.end], span.first - span.start).logprobs
    expected = plain(IDS[span.start : span.end - 1])[-2:]
    np.testing.assert_allclose(found, expected[[0, 1], IDS[span.first : span.end]], atol=1e-4)
    assert np.abs(found - score(model, IDS).logprobs[span.first - 1 : span.end - 1]).max() > 1e-3


def test_a_model_is_no_distance_from_itself_and_numpys_from_another() -> None:
    model, other = small_model(CONFIG), small_model(CONFIG, seed=1)
    same = compare(model, model, IDS, caches=(model.new_cache(), model.new_cache()))
    assert not same.kl.any() and same.agrees.all()
    np.testing.assert_array_equal(same.logprobs, score(model, IDS).logprobs)
    first = 5
    found = compare(model, other, IDS, first)
    q, p = plain(IDS)[first - 1 : -1], plain(IDS, seed=1)[first - 1 : -1]
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-3, atol=1e-4)
    assert found.agrees.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    np.testing.assert_allclose(found.reference, p[np.arange(len(p)), IDS[first:]], rtol=1e-4, atol=1e-4)
    assert found.kl.dtype == np.float32 and found.kl.min() > 0


def test_rows_of_a_batch_do_not_see_their_padding() -> None:
    model = small_model(CONFIG)
    rows = [IDS[:5], IDS[9:30], IDS[2:3]]
    before = [IDS[20:38], [], IDS[:2]]
    caches = []
    for ids in before:
        caches.append(model.new_cache())
        if ids:
            model(mx.array([ids]), caches[-1])
    padded = mx.array([row + [0] * (21 - len(row)) for row in rows])
    found = np.concatenate(
        [np.array(log_softmax(part)) for part in read_logits(model, padded, BatchCache(caches))], 1
    )
    for row, start, logprobs in zip(rows, before, found, strict=True):
        expected = plain([*start, *row])[len(start) :]
        np.testing.assert_allclose(logprobs[: len(row)], expected, rtol=1e-3, atol=1e-3)


def test_log_softmax_is_exact_far_from_zero_and_in_16_bits() -> None:
    logits = mx.array([[1e4, 1e4 - 1, -1e4], [0.0, 0.0, 0.0]])
    expected = [[-0.3132617, -1.3132617, -20000.3132617], [-1.0986123] * 3]
    np.testing.assert_allclose(np.array(log_softmax(logits)), expected, rtol=1e-6)
    assert log_softmax(logits.astype(mx.bfloat16)).dtype == mx.float32


def test_what_cannot_be_scored_is_refused() -> None:
    model, full = small_model(CONFIG), small_model(small_config(sliding_window=None, max_position_embeddings=16))
    with pytest.raises(TokenizerError, match="token id 97 is outside"):
        score(model, [1, 97])
    with pytest.raises(TokenizerError, match="token id -1 is outside"):
        score(model, [-1, 5])
    for ids, first in (([], 1), ([1], 1), ([1, 2], 2), ([1, 2], 0)):
        with pytest.raises(InputError, match="nothing to score"):
            score(model, ids, first)
    with pytest.raises(PromptTooLongError, match="context holds 16"):
        score(full, IDS)
    used = model.new_cache()
    model(mx.array([[1]]), used)
    with pytest.raises(InputError, match="an empty cache"):
        score(model, IDS, cache=used)
    with pytest.raises(InputError, match="97 and 96 tokens cannot be compared"):
        compare(model, small_model(small_config(vocab_size=96)), [1, 2])
    for stride in (0, 5):
        with pytest.raises(InputError, match="between 1 and the context of 4"):
            list(spans(9, 4, stride))
