"""Fused products: the same numbers from fewer operations, and not a byte more.

That holds in every way of quantising.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from models import named_arrays, random_weights, small_config

import m7mlx.fuse
from m7mlx.cache import RollingCache
from m7mlx.fuse import fuse
from m7mlx.model import Mistral

pytestmark = pytest.mark.usefixtures("without_kernels")  # which take weights as they lie

IDS = [1, 50, 3, 96, 0, 17, 17, 8, 2, 44, 31, 60]


def plain(tied: bool = False) -> Mistral:
    """Return a model that is laid out as its weights lie on disk."""
    config = small_config(hidden_size=64, intermediate_size=192, tie_word_embeddings=tied)
    model = Mistral(config)
    model.load_weights([(name, mx.array(array)) for name, array in random_weights(config).items()])
    return model


def logits(model: Mistral, cache: RollingCache) -> np.ndarray:
    """A prefill, then a token at a time across the window of 7."""
    parts = [model(mx.array([IDS[:4]]), cache)] + [model(mx.array([[token]]), cache) for token in IDS[4:]]
    return np.array(mx.concatenate(parts, axis=1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_same_numbers(monkeypatch: pytest.MonkeyPatch, tied: bool, on_cpu: bool) -> None:
    model = plain(tied)
    before, nbytes = logits(model, model.new_cache()), model.nbytes
    monkeypatch.setattr(m7mlx.fuse, "on_cpu", lambda: on_cpu)
    fuse(model)
    np.testing.assert_allclose(logits(model, model.new_cache()), before, rtol=1e-5, atol=1e-5)
    assert model.nbytes == nbytes
    names = {name.split(".")[-2] for name in named_arrays(model.model.layers[0])}
    feed_forward = ("gate_proj", "up_proj") if on_cpu else ("gate_up_proj",)
    assert names == {
        *("qkv_proj", "o_proj", "down_proj", "input_layernorm", "post_attention_layernorm"),
        *feed_forward,
    }


@pytest.mark.parametrize("scheme", [(4, 32, "affine"), (8, 64, "affine"), (4, 32, "mxfp4"), (4, 16, "nvfp4")])
def test_quantised(monkeypatch: pytest.MonkeyPatch, scheme: tuple[int, int, str]) -> None:
    monkeypatch.setattr(m7mlx.fuse, "on_cpu", lambda: False)
    bits, group_size, mode = scheme
    model = plain()
    nn.quantize(model, group_size, bits, mode=mode)
    before, nbytes = logits(model, model.new_cache()), model.nbytes
    fuse(model)
    assert isinstance(model.model.layers[1].self_attn.qkv_proj, nn.QuantizedLinear)
    assert isinstance(model.model.layers[1].mlp.gate_up_proj, nn.QuantizedLinear)
    np.testing.assert_allclose(logits(model, model.new_cache()), before, rtol=1e-5, atol=1e-5)
    assert model.nbytes == nbytes


def test_what_is_quantised_in_different_ways_stays_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours may be quantised in different ways.

    Mixed recipes give values and down projections more bits; rules may leave a module as it is.
    """
    monkeypatch.setattr(m7mlx.fuse, "on_cpu", lambda: False)

    def scheme(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized") or path.endswith("0.mlp.up_proj"):
            return False
        return {"group_size": 32, "bits": 8 if path.endswith("1.self_attn.v_proj") else 4}

    model = plain()
    nn.quantize(model, class_predicate=scheme)
    before = logits(model, model.new_cache())
    fuse(model)
    first, second = (model.model.layers[i] for i in (0, 1))
    assert ["qkv_proj" in block.self_attn for block in (first, second)] == [True, False]
    assert ["gate_up_proj" in block.mlp for block in (first, second)] == [False, True]
    np.testing.assert_allclose(logits(model, model.new_cache()), before, rtol=1e-5, atol=1e-5)
