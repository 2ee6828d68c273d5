"""Mistral in plain NumPy, float64 and without any cache: what every clever path must agree with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from m7mlx.config import ModelConfig

Array = NDArray[np.float64]


def logits(
    config: ModelConfig,
    weights: dict[str, np.ndarray],
    ids: list[int],
    max_kv_size: int | None = None,
    sinks: int = 0,
) -> Array:
    """Logits [len(ids), vocab_size]; full banded attention over the whole sequence, key by key.

    With `max_kv_size` each query sees the first `sinks` keys and the last others; every key is
    rotated anew for each query, by its place among those seen.
    """
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    x = w["model.embed_tokens.weight"][ids]
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        x = x + attention(
            config, w, layer, rms_norm(x, w[layer + "input_layernorm.weight"], config.norm_eps), max_kv_size, sinks
        )
        h = rms_norm(x, w[layer + "post_attention_layernorm.weight"], config.norm_eps)
        gate, up = h @ w[layer + "mlp.gate_proj.weight"].T, h @ w[layer + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[layer + "mlp.down_proj.weight"].T
    x = rms_norm(x, w["model.norm.weight"], config.norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return x @ w[head].T


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    size: Array = np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x / size * weight


def attention(
    config: ModelConfig,
    w: dict[str, Array],
    layer: str,
    x: Array,
    max_kv_size: int | None = None,
    sinks: int = 0,
) -> Array:
    length, dim = len(x), config.head_dim
    q = (x @ w[layer + "self_attn.q_proj.weight"].T).reshape(length, config.n_heads, dim)
    k = (x @ w[layer + "self_attn.k_proj.weight"].T).reshape(length, config.n_kv_heads, dim)
    v = (x @ w[layer + "self_attn.v_proj.weight"].T).reshape(length, config.n_kv_heads, dim)
    out = np.zeros_like(q)
    for position in range(length):
        first = 0 if config.sliding_window is None else max(0, position - config.sliding_window + 1)
        seen = list(range(first, position + 1))
        if max_kv_size is not None and len(seen) > max_kv_size:
            seen = seen[:sinks] + seen[len(seen) - (max_kv_size - sinks) :]
        places = np.arange(len(seen)) + first
        rotated_q = rope(config, q[position][None], places[-1:])[0]
        rotated_k = rope(config, k[seen], places)
        for head in range(config.n_heads):
            shared = head // (config.n_heads // config.n_kv_heads)
            scores = rotated_k[:, shared] @ rotated_q[head] / np.sqrt(dim)
            p = np.exp(scores - scores.max())
            out[position, head] = (p / p.sum()) @ v[seen, shared]
    return out.reshape(length, -1) @ w[layer + "self_attn.o_proj.weight"].T


def rope(config: ModelConfig, x: Array, positions: np.ndarray) -> Array:
    """Rotate pairs (i, i + head_dim / 2) by position · theta^(−2i / head_dim)."""
    half = config.head_dim // 2
    angles = np.outer(positions, config.rope_theta ** (-np.arange(half) / half))[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)
