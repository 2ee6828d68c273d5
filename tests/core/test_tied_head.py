"""A head in the files of a model that says it is tied.

The head is the embedding once more, or the model's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from m7mlx_convert.convert import convert
from m7mlx_plan.weights import list_weights
from models import random_weights, small_config, write_folder
from sources import assert_same, native_weights, read_weights, write_native

from m7mlx import load
from m7mlx.config import ModelConfig
from m7mlx.errors import WeightsError
from m7mlx.quantization import Quantization
from m7mlx.shard import MODES, Shard

TIED = small_config(vocab_size=32000, hidden_size=64, n_layers=2, tie_word_embeddings=True)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = mx.array([[1, 5, 90, 7]])


def write(folder: Path, head: mx.array, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """A folder whose config says tied, with a head in its weights."""
    write_folder(folder, TIED)
    weights = {name: mx.array(array).astype(dtype) for name, array in random_weights(TIED).items()}
    weights[HEAD] = head
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return weights


def embedding(dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(random_weights(TIED)[EMBEDDING]).astype(dtype)


def changed(row: int, column: int) -> mx.array:
    head = np.array(embedding())
    head[row, column] += 0.5
    return mx.array(head)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_embedding_once_more_is_left_out(tmp_path: Path, dtype: mx.Dtype) -> None:
    weights = write(tmp_path / "m", embedding(dtype), dtype)
    model, _ = load(tmp_path / "m")
    assert model.config.tie_word_embeddings
    out = convert(str(tmp_path / "m"), tmp_path / "out")
    assert_same(read_weights(out), {name: array for name, array in weights.items() if name != HEAD})
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert list_weights(str(tmp_path / "m"), None)[0].tie_word_embeddings


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1023, 63), (1024, 0), (31999, 63)])
def test_a_head_of_its_own_is_used(tmp_path: Path, row: int, column: int) -> None:
    """One number anywhere makes it another head, as in transformers."""
    weights = write(tmp_path / "m", changed(row, column))
    model, _ = load(tmp_path / "m")
    assert not model.config.tie_word_embeddings
    hidden = model.hidden(IDS)
    assert mx.allclose(model.head(hidden), hidden @ changed(row, column).T, rtol=1e-4, atol=1e-4).item()
    out = convert(str(tmp_path / "m"), tmp_path / "out")
    assert_same(read_weights(out), weights)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert not list_weights(str(tmp_path / "m"), None)[0].tie_word_embeddings


def test_types_that_differ_are_compared_by_number(tmp_path: Path) -> None:
    exact = mx.round(embedding() * 16) / 16  # the same numbers in all three types
    for dtype in (mx.float16, mx.bfloat16):
        weights = write(tmp_path / "m", exact.astype(dtype))
        mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), weights | {EMBEDDING: exact})
        assert load(tmp_path / "m")[0].config.tie_word_embeddings


def test_a_quantised_head_beside_an_embedding_that_is_not_is_another(tmp_path: Path) -> None:
    weights = write(tmp_path / "m", embedding())
    scheme = Quantization(64, 8, overrides=dict.fromkeys([n.removesuffix(".weight") for n in weights if n != HEAD]))
    kinds = zip(("weight", "scales", "biases"), mx.quantize(embedding(), group_size=64, bits=8), strict=True)
    weights |= {f"lm_head.{kind}": array for kind, array in kinds}
    mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), weights)
    data = TIED.to_dict() | {"quantization": scheme.to_dict()}
    (tmp_path / "m" / "config.json").write_text(json.dumps(data))
    assert not load(tmp_path / "m")[0].config.tie_word_embeddings
    out = convert(str(tmp_path / "m"), tmp_path / "out")
    assert_same(read_weights(out), weights)
    assert ModelConfig.from_folder(out).tie_word_embeddings is False


@pytest.mark.parametrize("mode", MODES)
def test_shards_have_that_head_as_well(tmp_path: Path, mode: Any) -> None:
    write(tmp_path / "m", changed(7, 7))
    for rank in range(2):
        model, _ = load(tmp_path / "m", shard=Shard(mode, rank, 2))
        assert not model.config.tie_word_embeddings
        hidden = mx.ones((1, 1, 64))
        assert mx.allclose(model.head(hidden), hidden @ changed(7, 7).T, rtol=1e-4, atol=1e-4).item()


def test_a_head_that_stands_for_both_is_refused(tmp_path: Path) -> None:
    """A file with the head alone, as safetensors' save_model writes it, is refused.

    save_model leaves out the second of two names; transformers' save_pretrained the head.
    """
    weights = write(tmp_path / "m", embedding())
    del weights[EMBEDDING]
    mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), weights)
    for read_it in (lambda: load(tmp_path / "m"), lambda: convert(str(tmp_path / "m"), tmp_path / "out")):
        with pytest.raises(WeightsError, match=r"has lm_head but not model\.embed_tokens, which is tied to it"):
            read_it()


@pytest.mark.parametrize("shape", [(32001, 64), (32000, 63), (32000,), (0, 64)])
def test_a_head_that_does_not_fit_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    write(tmp_path / "m", mx.zeros(shape))
    with pytest.raises(WeightsError, match=r"lm_head\.weight has shape"):
        load(tmp_path / "m")


@pytest.mark.parametrize("is_own", [False, True])
def test_mistrals_own_layout(tmp_path: Path, is_own: bool) -> None:
    config = small_config(vocab_size=32000, tie_word_embeddings=True)
    write_native(tmp_path / "m", config, tied_embeddings=True)
    weights = random_weights(config)
    head = weights[EMBEDDING] + (0.5 if is_own else 0)
    arrays = native_weights(config) | {"output.weight": mx.array(head)}
    mx.save_safetensors(str(tmp_path / "m" / "consolidated.safetensors"), arrays)
    out = read_weights(convert(str(tmp_path / "m"), tmp_path / "out"))
    expected = {name: mx.array(array) for name, array in weights.items()}
    assert_same(out, expected | ({HEAD: mx.array(head)} if is_own else {}))
