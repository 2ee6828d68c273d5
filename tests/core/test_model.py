"""The model against plain NumPy, and against golden logits of transformers.

The comparison with NumPy goes over the shapes that the family has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from models import random_weights, small_config, small_model

from m7mlx.config import ModelConfig
from m7mlx.decode import decode, prefill
from m7mlx.loading import build
from m7mlx.positions import window_mask
from m7mlx.sampling import Sampler, Sampling

pytestmark = pytest.mark.usefixtures("computed_by")

GOLDEN = Path(__file__).parent / "golden"
SHAPES: list[dict[str, Any]] = [
    {"n_kv_heads": 1},
    {"n_kv_heads": 4},
    {"n_heads": 8, "n_kv_heads": 1},
    {"n_heads": 6, "n_kv_heads": 3, "head_dim": 10, "hidden_size": 52},
    {"tie_word_embeddings": True, "rope_theta": 1e6, "norm_eps": 1e-3},
    {"sliding_window": None, "vocab_size": 131},
    {"sliding_window": 1, "n_layers": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_equal_the_reference(shape: dict[str, Any]) -> None:
    config = small_config(**shape)
    ids = [(7 * i + i * i) % 97 for i in range(50)]
    expected = reference.logits(config, random_weights(config), ids)
    model = small_model(config)
    whole = model(mx.array([ids]))[0]
    assert np.abs(np.array(whole) - expected).max() / np.abs(expected).max() < 1e-5
    last = prefill(model, ids, model.new_cache(), chunk=9)[0]
    assert np.abs(np.array(last) - expected[-1]).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize("case", sorted(p.stem for p in GOLDEN.glob("*.json")))
def test_logits_and_continuation_equal_those_of_transformers(case: str) -> None:
    """Files made by `tests/core/golden/make.py` from Hugging Face's MistralForCausalLM."""
    golden = json.loads((GOLDEN / f"{case}.json").read_text())
    arrays = np.load(GOLDEN / f"{case}.npz")
    config = ModelConfig.from_dict(golden["config"])
    model = build(config, {k: mx.array(arrays[k].astype(np.float32)) for k in arrays.files if k != "logits"})
    cache = model.new_cache()
    prompt, expected = golden["prompt"], arrays["logits"]
    found = mx.concatenate([model(mx.array([prompt[i : i + 13]]), cache) for i in range(0, len(prompt), 13)], axis=1)
    assert np.abs(np.array(found[0]) - expected).max() / np.abs(expected).max() < 1e-4
    cache.ids += prompt
    tokens = list(decode(model, found[:, -1], cache, Sampler(Sampling()), len(golden["continuation"])))
    assert tokens == golden["continuation"]


def test_there_are_golden_files() -> None:
    assert len(list(GOLDEN.glob("*.json"))) == len(list(GOLDEN.glob("*.npz"))) >= 3


def test_window_mask_is_the_one_in_its_docstring() -> None:
    positions = mx.arange(5)
    assert window_mask(positions, positions, 3).astype(mx.int32).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert window_mask(positions, mx.array([-1, 0]), None).astype(mx.int32).tolist() == [[0, 1]] * 5


def test_a_token_reaches_as_far_back_as_window_times_layers_and_no_further() -> None:
    """The receptive field is k · (W − 1) positions back (paper, section 2).

    Each window includes the token itself.
    """
    window = 4
    config = small_config(sliding_window=window, n_layers=3)
    model = small_model(config)
    ids = [1] * 30
    base = model(mx.array([ids]))[0, -1]
    reach = config.n_layers * (window - 1)
    for back in range(1, 30):
        changed = list(ids)
        changed[-1 - back] = 2
        differs = not mx.array_equal(model(mx.array([changed]))[0, -1], base).item()
        assert differs == (back <= reach), back


def test_nbytes_counts_every_weight() -> None:
    config = small_config()
    assert small_model(config).nbytes == sum(array.nbytes for array in random_weights(config).values())
