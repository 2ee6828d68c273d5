"""Products with the model's matrices: one step of our kernels where there are any, or MLX's steps.

On Linux's CPU backend a matrix is met as it lies in its file, packed or in 16 bits, and what stands
beside the product (the norm before it, the sum after it, SwiGLU between gate and up) is done in the
same step. Everywhere else these are MLX's operations, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from m7mlx.arrays import has_kernels, swiglu
from m7mlx.cpu import native

if TYPE_CHECKING:
    from m7mlx.cpu import _native

_KNOWN = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)


class _Kept(NamedTuple):
    """A module's matrix as the kernels take it, and what it was made of.

    weight  None where they do not take it
    kind    how it is stored
    """

    codes: mx.array | None
    weight: _native.Weight | None
    kind: tuple[object, ...]


def project(
    x: mx.array,  # [..., in]
    matrices: Sequence[nn.Module],
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """Return norm(x) times each matrix, side by side: [..., the outputs of all]; plus a residual.

    An embedding counts as the matrix of a tied head.
    """
    if _can_run(x, norm) and (residual is None or residual.dtype == mx.float32):
        weights = [_keep(matrix).weight for matrix in matrices]
        if None not in weights:
            gain, eps = (None, 0.0) if norm is None else (norm["weight"], norm.eps)
            product: mx.array = native.kernels().product(
                x, weights, gain, eps, residual, rounded=native.rounds_inputs()
            )
            return product
    if norm is not None:
        x = norm(x)
    products = [m.as_linear(x) if hasattr(m, "as_linear") else m(x) for m in matrices]
    out = products[0] if len(products) == 1 else mx.concatenate(products, axis=-1)
    return out if residual is None else residual + out


def project_gated(x: mx.array, matrices: Sequence[nn.Module], norm: nn.RMSNorm) -> mx.array:
    """Return silu(gate) · up for norm(x) [..., in]: of two matrices, or of one that holds both."""
    if len(matrices) == 1:
        gate, up = mx.split(project(x, matrices, norm), 2, axis=-1)
        return swiglu(gate, up)
    if _can_run(x, norm):
        one, other = map(_keep, matrices)
        if one.weight is not None and other.weight is not None and one.kind == other.kind:
            weights = [one.weight, other.weight]
            product: mx.array = native.kernels().product(
                x, weights, norm["weight"], norm.eps, gated=True, rounded=native.rounds_inputs()
            )
            return product
    x = norm(x)
    return swiglu(*(project(x, (matrix,)) for matrix in matrices))


def look_up(ids: mx.array, embedding: nn.Module, dtype: mx.Dtype) -> mx.array:
    """Return the rows [..., hidden_size] of an embedding for ids, in the activations' type."""
    if dtype == mx.float32 and has_kernels() and (weight := _keep(embedding).weight) is not None:
        found: mx.array = native.kernels().lookup(ids, weight)
        return found
    rows: mx.array = embedding(ids)
    return rows


def _can_run(x: mx.array, norm: nn.RMSNorm | None) -> bool:
    """Tell whether the kernels take these: they compute in float32 alone."""
    if x.dtype != mx.float32 or not has_kernels():
        return False
    return norm is None or (type(norm) is nn.RMSNorm and norm["weight"].dtype == mx.float32)


def _keep(module: nn.Module) -> _Kept:
    """Return a module's matrix as the kernels take it, made once for the arrays that it has now."""
    kept: _Kept | None = vars(module).get("_kept")
    if kept is None or kept.codes is not module.get("weight"):
        kept = _make(module)
        object.__setattr__(module, "_kept", kept)
    return kept


def _make(module: nn.Module) -> _Kept:
    # An adapter's modules, and those whose products are added up by several processes, do more.
    codes = module.get("weight")
    if codes is None or type(module) not in _KNOWN or "bias" in module:
        return _Kept(codes, None, ())
    scales, biases = module.get("scales"), module.get("biases")
    scheme = () if scales is None else (module.group_size, module.bits, module.mode)
    weight = native.kernels().Weight(codes, scales, biases, *scheme)
    return _Kept(codes, weight, (*scheme, codes.dtype, None if scales is None else scales.dtype))
