"""Grouped-query attention with rotary positions and Mistral's sliding window (paper, section 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from m7mlx.cache import LayerRing, Step
    from m7mlx.config import ModelConfig


def window_mask(query_positions: mx.array, key_positions: mx.array, window: int | None) -> mx.array:
    """Which query may see which key: bool [queries, keys].

    A query at position p sees the `window` keys p − window + 1 … p, itself included, as in Hugging Face and
    vLLM; None is full causal attention. A negative key position stands for "no key there".

    With window 3 and positions 0 … 4:

        query 0: 1 0 0 0 0
        query 1: 1 1 0 0 0
        query 2: 1 1 1 0 0
        query 3: 0 1 1 1 0
        query 4: 0 0 1 1 1
    """
    distance = query_positions[:, None] - key_positions[None, :]
    mask = (distance >= 0) & (key_positions >= 0)[None, :]
    return mask if window is None else mask & (distance < window)


class Attention(nn.Module):
    """`n_heads` query heads share `n_kv_heads` key-value heads; keys and values go through the cache."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        d, heads, kv = config.hidden_size, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d, heads, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = nn.Linear(heads, d, bias=False)

    def __call__(self, x: mx.array, ring: LayerRing, step: Step) -> mx.array:  # x: [B, L, hidden]
        B, L, _ = x.shape
        q = self.q_proj(x).reshape(B, L, self.n_heads, self.head_dim).swapaxes(1, 2)  # [B, H, L, head_dim]
        k = self.k_proj(x).reshape(B, L, self.n_kv_heads, self.head_dim).swapaxes(1, 2)  # [B, KV, L, head_dim]
        v = self.v_proj(x).reshape(B, L, self.n_kv_heads, self.head_dim).swapaxes(1, 2)
        keys, values = ring.update(self.rope(k, step.offset), v, step)  # [B, KV, keys, head_dim]
        out = mx.fast.scaled_dot_product_attention(
            self.rope(q, step.offset), keys, values, scale=self.head_dim**-0.5, mask=step.mask
        )
        merged: mx.array = self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))
        return merged

    def rope(self, x: mx.array, offset: int) -> mx.array:  # [B, heads, L, head_dim], L positions from offset on
        return mx.fast.rope(x, self.head_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=offset)
