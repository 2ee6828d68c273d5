"""Embeddings: the mean, or the last, of what the head reads, whatever the company and chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import small_config, small_model

import m7mlx.embedding
from m7mlx import Mistral, PromptTooLongError, Tokenizer, TokenizerError, embed, load
from m7mlx.errors import InputError

pytestmark = pytest.mark.usefixtures("computed_by")

TEXTS = [
    "Hello",
    "",
    "The window is sixteen tokens long, and this is longer. " * 3,
    "Hello",
    "Bye, then",
]


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Mistral, Tokenizer]:
    return load(model_folder)


def plain(model: Mistral, ids: list[int], pooling: str) -> np.ndarray:
    """The formula, in one pass over one text."""
    hidden = np.array(model.hidden(mx.array([ids]))[0], np.float32)
    pooled: np.ndarray = hidden.mean(axis=0) if pooling == "mean" else hidden[-1]
    return pooled


def assert_close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("chunk", [3, 16, 512])
def test_the_formula_whatever_the_company_and_the_chunks(
    loaded: tuple[Mistral, Tokenizer], pooling: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window of 16 is exact: the longest text has more tokens."""
    model, tokenizer = loaded
    monkeypatch.setattr(m7mlx.embedding, "default_chunk", lambda model: chunk)
    found = embed(model, tokenizer, TEXTS, pooling=pooling)
    assert found.shape == (5, model.config.hidden_size) and found.dtype == mx.float32
    prompts = [tokenizer.encode(text, add_bos=True) for text in TEXTS]
    assert max(map(len, prompts)) > 2 * 16
    for row, ids in zip(found, prompts, strict=True):
        assert_close(row, plain(model, ids, pooling))
    assert_close(found, embed(model, tokenizer, prompts, pooling=pooling))
    assert mx.array_equal(found[0], found[3]).item()


def test_length_one(loaded: tuple[Mistral, Tokenizer]) -> None:
    found = embed(*loaded, TEXTS, normalize=True)
    assert_close(mx.linalg.norm(found, axis=1), np.ones(5))
    assert_close(found * mx.linalg.norm(embed(*loaded, TEXTS), axis=1, keepdims=True), embed(*loaded, TEXTS))


def test_no_texts(loaded: tuple[Mistral, Tokenizer]) -> None:
    assert embed(*loaded, []).shape == (0, 48)


def test_keys_and_values_stay_within_the_window(
    loaded: tuple[Mistral, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    caches = []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda: caches.append(new_cache()) or caches[-1])  # type: ignore[func-returns-value]
    embed(model, tokenizer, [list(range(100, 900))])
    assert [ring.buffers[0].shape[2] for ring in caches[-1].rings] == [16 + 8] * 2


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("Hello", {}, "a list of texts"),
        ([["Hello"]], {}, "a list of texts"),
        ([{"role": "user", "content": "Hello"}], {}, "a list of texts"),
        ([None], {}, "a list of texts"),
        (["Hello"], {"pooling": "max"}, "pooling must be"),
        ([[]], {}, "the prompt is empty"),
    ],
)
def test_what_is_none(loaded: tuple[Mistral, Tokenizer], texts: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        embed(*loaded, texts, **options)


def test_ids_and_lengths_beyond_the_model(loaded: tuple[Mistral, Tokenizer]) -> None:
    with pytest.raises(TokenizerError, match="outside the model's vocabulary"):
        embed(*loaded, [[32768]])
    full = small_model(small_config(vocab_size=32768, sliding_window=None, max_position_embeddings=20))
    with pytest.raises(PromptTooLongError, match="context holds 20"):
        embed(full, loaded[1], [[5] * 21])
