"""Grouped-query attention with rotary positions and Mistral's sliding window (paper, section 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from m7mlx.arrays import on_cpu, softmax

if TYPE_CHECKING:
    from m7mlx.config import ModelConfig
    from m7mlx.ring import KeysValues, KVFormat, LayerRing, Rows, Sinks, Step

_IN_CACHE = 1 << 18  # scores, 1 MB: about the cache that a core has for itself


def window_mask(query_positions: mx.array, key_positions: mx.array, window: int | None) -> mx.array:
    """Which query may see which key: bool [..., queries, keys], from positions [..., queries] and [..., keys].

    A query at position p sees the `window` keys p − window + 1 … p, itself included, as in Hugging Face and
    vLLM; None is full causal attention. A negative key position stands for "no key there".

    With window 3 and positions 0 … 4:

        query 0: 1 0 0 0 0
        query 1: 1 1 0 0 0
        query 2: 1 1 1 0 0
        query 3: 0 1 1 1 0
        query 4: 0 0 1 1 1
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    mask = (distance >= 0) & (key_positions >= 0)[..., None, :]
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
        heads = self._project(x).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)  # [B, H + 2 KV, L, head_dim]
        out = attend_to_ring(heads, ring, step, self.rope_theta, self.n_kv_heads)
        merged: mx.array = self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))
        return merged

    def _project(self, x: mx.array) -> mx.array:
        """All queries, keys and values side by side: [B, L, (H + 2 KV) · head_dim]."""
        if "qkv_proj" in self:  # after `fuse`
            fused: mx.array = self.qkv_proj(x)
            return fused
        return mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)


def attend_to_ring(
    heads: mx.array, ring: LayerRing, step: Step, rope_theta: float, n_kv_heads: int
) -> mx.array:  # heads: [B, H + 2 KV, L, head_dim], queries, keys and values, none rotated yet; → [B, H, L, head_dim]
    """Rotate, store the new keys and values in the ring, and attend to all that the step lets see."""
    values_at, keys_at = heads.shape[1] - n_kv_heads, heads.shape[1] - 2 * n_kv_heads
    rotated = ring.format.turn(rotate(heads[:, :values_at], step, rope_theta))
    kv = ring.update(rotated[:, keys_at:], heads[:, values_at:], step)
    q, scale = rotated[:, :keys_at], heads.shape[-1] ** -0.5
    if step.sinks is not None and ring.sinks is not None:
        to_sinks = ring.format.turn(rope_each(heads[:, :keys_at], step.sinks.positions, rope_theta))
        return attend(q * scale, kv, step.mask, (to_sinks * scale, ring.sinks, step.sinks.visible))
    if kv.format.bits is not None or on_cpu():  # there, MLX makes the fused operation one product per query head
        return attend(q * scale, kv, step.mask)
    mask = None if isinstance(step.mask, str) and q.shape[2] == 1 else step.mask  # one query may see all there is
    return mx.fast.scaled_dot_product_attention(q, kv.keys[0], kv.values[0], scale=scale, mask=mask)


def attend(
    q: mx.array,
    kv: KeysValues,
    mask: mx.array | str,
    sinks: tuple[mx.array, Sinks, mx.array] | None = None,
) -> mx.array:  # q [B, H, L, head_dim], scaled → [B, H, L, head_dim]
    """What no fused kernel does: attention to quantised rows where they lie, to sinks besides, and on a CPU.

    sinks  queries as rotated for them, their keys and values, and which query sees which of them
    """
    (_, H, L, _), (n_kv_heads, n_keys) = q.shape, kv.keys[0].shape[1:3]
    if isinstance(mask, str):  # causal, aligned to the end
        mask = window_mask(mx.arange(n_keys - L, n_keys), mx.arange(n_keys), None) if L > 1 else mx.array([[True]])
    bias = mx.where(mask, 0.0, -mx.inf).astype(q.dtype)
    bias = bias if bias.ndim == 2 else bias[:, :, None]
    if sinks is not None or q.size // q.shape[-1] * n_keys <= _IN_CACHE or not on_cpu():
        return _attend(q, kv, bias, sinks)
    # Scores are gone through a dozen times: one KV head's after the other's, they stay in the processor's cache.
    heads = [
        _attend(q[:, i * H // n_kv_heads : (i + 1) * H // n_kv_heads], kv.head(i), bias) for i in range(n_kv_heads)
    ]
    return mx.concatenate(heads, axis=1)


def _attend(
    q: mx.array, kv: KeysValues, bias: mx.array, sinks: tuple[mx.array, Sinks, mx.array] | None = None
) -> mx.array:
    B, H, L, D = q.shape
    n_kv_heads, n_keys = kv.keys[0].shape[1:3]
    groups = (B, n_kv_heads, H // n_kv_heads, L, -1)
    rows = (B, n_kv_heads, -1, D)  # the queries of a group one below the other: one product per KV head
    scores = _product(q.reshape(rows), kv.keys, kv.format, transpose=True).reshape(groups) + bias
    if sinks is not None:
        to_sinks, (sink_keys, sink_values), visible = sinks
        more = (to_sinks.reshape(rows) @ sink_keys.swapaxes(2, 3)).reshape(groups)
        scores = mx.concatenate([scores, mx.where(visible[:, :, None], more, -mx.inf)], axis=-1)
    weights, total = softmax(scores)
    weights = weights.reshape(B, n_kv_heads, -1, weights.shape[-1])
    out = _product(weights[..., :n_keys], kv.values, kv.format, transpose=False)
    if sinks is not None:
        out = out + weights[..., n_keys:] @ sink_values
    return (out if total is None else out.reshape(groups) / total).reshape(B, H, L, D)


def _product(x: mx.array, rows: Rows, kv_format: KVFormat, transpose: bool) -> mx.array:
    if kv_format.bits is None:
        return x @ (rows[0].swapaxes(2, 3) if transpose else rows[0])
    codes, scales, biases = rows
    return mx.quantized_matmul(
        x, codes, scales, biases, transpose=transpose, group_size=kv_format.group_size, bits=kv_format.bits
    )


def rotate(x: mx.array, step: Step, theta: float) -> mx.array:
    """Rotate x [B, heads, L, head_dim] to the positions of the step."""
    if step.rotation is None:
        return rope(x, step.rope_offset, theta)
    return (x.swapaxes(1, 2) @ step.rotation).swapaxes(1, 2)  # one product for all heads


def rotation_of(offset: int | mx.array, theta: float, head_dim: int) -> mx.array:
    """What `rope` does to one token at `offset` (or offset[row]), as matrices [B or 1, 1, head_dim, head_dim].

    A rotation is linear: its matrix is the unit vectors, rotated. All layers share it. On a CPU `rope` is a dozen
    operations, and a product with so small a matrix takes less than one of them.
    """
    rows = 1 if isinstance(offset, int) else offset.size
    units = mx.broadcast_to(mx.eye(head_dim)[None, :, None], (rows, head_dim, 1, head_dim))
    return rope(units, offset, theta).swapaxes(1, 2)


def rope(x: mx.array, offset: int | mx.array, theta: float) -> mx.array:
    """Rotate x [B, heads, L, head_dim], L positions from `offset` (or offset[row]) on."""
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=theta, scale=1.0, offset=offset)


def rope_each(x: mx.array, positions: mx.array, theta: float) -> mx.array:
    """Rotate x [B, heads, L, head_dim] to any positions [B or 1, L]."""
    B, heads, L, D = x.shape
    tokens = x.swapaxes(1, 2).reshape(B * L, heads, 1, D)
    offsets = mx.broadcast_to(positions, (B, L)).reshape(-1)
    return rope(tokens, offsets, theta).reshape(B, L, heads, D).swapaxes(1, 2)
