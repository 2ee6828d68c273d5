"""Grouped-query attention over a layer's ring (paper, section 2).

Which token sees which, and how it is rotated, is decided in `m7mlx.positions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from m7mlx.arrays import on_cpu, softmax
from m7mlx.config import ModelConfig
from m7mlx.positions import ForwardPass, window_mask
from m7mlx.products import project
from m7mlx.ring import KeysValues, KVFormat, LayerRing, Sinks, Stored

_IN_CACHE = 1 << 18  # scores, 1 MB: about the cache that a core has for itself


class LayerPass(NamedTuple):
    """What one layer has of a forward pass: its ring of a cache, and the pass over that."""

    ring: LayerRing
    forward: ForwardPass


class Attention(nn.Module):
    """Attention in which `n_heads` query heads share `n_kv_heads` key-value heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        d, heads, kv = config.hidden_size, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d, heads, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = nn.Linear(heads, d, bias=False)

    def __call__(self, x: mx.array, norm: nn.RMSNorm, passes: Sequence[LayerPass]) -> mx.array:
        """Return x [B, L, hidden_size], to which what norm(x) attends to is added.

        Where there are several passes, x is [1, all their tokens, hidden_size].
        """
        matrices = (self.qkv_proj,) if "qkv_proj" in self else (self.q_proj, self.k_proj, self.v_proj)  # after `fuse`
        heads = project(x, matrices, norm)  # queries, keys and values side by side: [B, L, (H + 2 KV) · head_dim]
        out = self._attend(heads, *passes[0]) if len(passes) == 1 else self._attend_each(heads, passes)
        return project(out, (self.o_proj,), residual=x)

    def _attend_each(self, heads: mx.array, passes: Sequence[LayerPass]) -> mx.array:
        ends = list(accumulate(forward.rows * forward.length for _, forward in passes))
        outs = []
        for own, (ring, forward) in zip(mx.split(heads, ends[:-1], axis=1), passes, strict=True):
            if forward.rows > 1:
                own = own.reshape(forward.rows, forward.length, -1)
            out = self._attend(own, ring, forward)
            outs.append(out.reshape(1, -1, out.shape[-1]) if forward.rows > 1 else out)
        return mx.concatenate(outs, axis=1)

    def _attend(self, heads: mx.array, ring: LayerRing, forward: ForwardPass) -> mx.array:
        if ring.has_kernel(heads, forward):
            return ring.attend(heads, forward, self.n_kv_heads)
        B, L, _ = heads.shape
        split = heads.reshape(B, L, -1, self.head_dim).swapaxes(1, 2)  # [B, H + 2 KV, L, head_dim]
        return attend_to_ring(split, ring, forward, self.n_kv_heads).swapaxes(1, 2).reshape(B, L, -1)


def attend_to_ring(heads: mx.array, ring: LayerRing, forward: ForwardPass, n_kv_heads: int) -> mx.array:
    """Rotate, store the new keys and values in the ring, and attend to all that the pass lets see.

    Takes heads [B, H + 2 KV, L, head_dim]: queries, keys and values, none rotated yet. Returns
    [B, H, L, head_dim].
    """
    values_at, keys_at = heads.shape[1] - n_kv_heads, heads.shape[1] - 2 * n_kv_heads
    rotated = ring.format.turn(forward.rotate(heads[:, :values_at]))
    kv = ring.update(rotated[:, keys_at:], heads[:, values_at:], forward)
    q, scale = forward.rotation.scale_queries(rotated[:, :keys_at]), heads.shape[-1] ** -0.5
    if forward.sinks is not None and ring.sinks is not None:
        to_sinks = ring.format.turn(forward.rotation.scale_queries(forward.sinks.rotate(heads[:, :keys_at])))
        return attend(q * scale, kv, forward.mask, (to_sinks * scale, ring.sinks, forward.sinks.visible))
    if kv.format.is_packed or on_cpu():  # there, MLX makes the fused operation one product per query head
        return attend(q * scale, kv, forward.mask)
    mask = None if isinstance(forward.mask, str) and q.shape[2] == 1 else forward.mask  # one query sees all there is
    return mx.fast.scaled_dot_product_attention(q, kv.keys[0], kv.values[0], scale=scale, mask=mask)


def attend(
    q: mx.array,
    kv: KeysValues,
    mask: mx.array | str,
    sinks: tuple[mx.array, Sinks, mx.array] | None = None,
) -> mx.array:
    """Attend as no fused kernel does: to quantised rows where they lie, to sinks, and on a CPU.

    q      [B, H, L, head_dim], scaled; so is the result
    sinks  queries as rotated for them, their keys and values, and which query sees which of them
    """
    (_, H, L, _), (n_kv_heads, n_keys) = q.shape, kv.keys[0].shape[1:3]
    if isinstance(mask, str):  # causal, aligned to the end
        mask = window_mask(mx.arange(n_keys - L, n_keys), mx.arange(n_keys), None) if L > 1 else mx.array([[True]])
    bias = mx.where(mask, 0.0, -mx.inf).astype(q.dtype)
    bias = bias if bias.ndim == 2 else bias[:, :, None]
    if sinks is not None or q.size // q.shape[-1] * n_keys <= _IN_CACHE or not on_cpu():
        return _attend(q, kv, bias, sinks)
    # Scores are read a dozen times: one KV head at a time, they stay in the processor's cache.
    heads = [
        _attend(q[:, i * H // n_kv_heads : (i + 1) * H // n_kv_heads], kv.head(i), bias) for i in range(n_kv_heads)
    ]
    return mx.concatenate(heads, axis=1)


def _attend(
    q: mx.array,
    kv: KeysValues,
    bias: mx.array,
    sinks: tuple[mx.array, Sinks, mx.array] | None = None,
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


def _product(x: mx.array, stored: Stored, kv_format: KVFormat, transpose: bool) -> mx.array:
    if not kv_format.is_packed:
        rows = stored[0].astype(x.dtype)
        return x @ (rows.swapaxes(2, 3) if transpose else rows)
    codes, scales, biases = stored
    return mx.quantized_matmul(
        x, codes, scales, biases, transpose=transpose, group_size=kv_format.group_size, bits=kv_format.bits
    )
