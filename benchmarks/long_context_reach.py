"""The reach of one changed token: a part of `long_context.py`."""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
from m7mlx_bench.models import SMALL

from m7mlx import Mistral, ModelConfig, RollingCache
from m7mlx.decode import prefill
from m7mlx.loading import build

CHUNK = 64  # tokens read at a time
TOY = replace(
    SMALL,
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    n_layers=6,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    sliding_window=None,
)


def random_model(config: ModelConfig) -> Mistral:
    """Weights so large that every path through the model shows in its logits."""
    mx.random.seed(0)
    weights = {
        name: mx.random.normal(shape) * 1.5 * shape[-1] ** -0.5 if len(shape) > 1 else mx.ones(shape)
        for name, shape in config.weight_shapes().items()
    }
    return build(config, weights)


def moved(model: Mistral, ids: list[int], window: int, distances: Sequence[int]) -> list[float]:
    """Return the greatest change of a logit when the token so many positions before is another.

    Everything is computed in the same order each time: where nothing arrives, the change is 0.
    """
    config = replace(model.config, sliding_window=window)

    def last(tokens: list[int]) -> mx.array:
        return prefill(model, tokens, RollingCache(config), CHUNK)

    base = last(ids)
    found: list[float] = []
    for distance in distances:
        changed = list(ids)
        changed[-1 - distance] = (ids[-1 - distance] + 1) % config.vocab_size
        change = mx.abs(last(changed) - base).max().item()
        assert isinstance(change, float)
        found.append(change)
    return found
