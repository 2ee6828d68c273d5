"""Products with the model's matrices: a step of the kernels of ours where they are, of MLX's where not.

On Linux's CPU backend a matrix is met as it lies in its file, packed or in 16 bits, and what stands
beside the product (the norm before it, the sum after it, SwiGLU between gate and up) is done in the
same step. Everywhere else these are MLX's operations, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from m7mlx.arrays import has_kernels, swiglu
from m7mlx.cpu import native

if TYPE_CHECKING:
    from m7mlx.cpu._native import Weight

_KNOWN = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)


def project(
    x: mx.array,  # [..., in]
    matrices: Sequence[nn.Module],
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """Return norm(x) times each matrix, side by side: [..., the outputs of all]; plus a residual.

    An embedding counts as the matrix of a tied head.
    """
    weights = _weights(x, matrices)
    if weights is not None:
        gain, eps = (None, 0.0) if norm is None else (norm["weight"], norm.eps)
        return native.kernels().product(x, weights, gain, eps, residual)
    if norm is not None:
        x = norm(x)
    products = [m.as_linear(x) if hasattr(m, "as_linear") else m(x) for m in matrices]
    out = products[0] if len(products) == 1 else mx.concatenate(products, axis=-1)
    return out if residual is None else residual + out


def project_gated(x: mx.array, matrices: Sequence[nn.Module], norm: nn.RMSNorm) -> mx.array:
    """Return silu(gate) · up for norm(x) [..., in]: of two matrices, or of one that holds both."""
    weights = _weights(x, matrices) if len(matrices) == 2 else None
    if weights is not None and _is_alike(*matrices):
        return native.kernels().product(x, weights, norm["weight"], norm.eps, None, True)
    if len(matrices) == 2:
        x = norm(x)
        return swiglu(*(project(x, (matrix,)) for matrix in matrices))
    gate, up = mx.split(project(x, matrices, norm), 2, axis=-1)
    return swiglu(gate, up)


def look_up(ids: mx.array, embedding: nn.Module, dtype: mx.Dtype) -> mx.array:
    """Return the rows [..., hidden_size] of an embedding for ids, in the type of the activations."""
    weight = _weight(embedding) if dtype == mx.float32 and has_kernels() else None
    if weight is not None:
        return native.kernels().lookup(ids, weight)
    rows: mx.array = embedding(ids)
    return rows


def _weights(x: mx.array, matrices: Sequence[nn.Module]) -> list[Weight] | None:
    """Return the matrices as the kernels take them; None where they do not, or have no float32."""
    if x.dtype != mx.float32 or not has_kernels():
        return None
    found = []
    for matrix in matrices:
        weight = _weight(matrix)
        if weight is None:
            return None
        found.append(weight)
    return found


def _weight(module: nn.Module) -> Weight | None:
    """Return a module's matrix as the kernels take it, made once for the arrays that it has now."""
    if type(module) not in _KNOWN:  # an adapter's, or one whose product is summed with others'
        return None
    codes = module["weight"]
    known: tuple[Any, Weight | None] | None = vars(module).get("_kernel_weight")
    if known is None or known[0] is not codes:
        known = codes, _make_weight(module)
        object.__setattr__(module, "_kernel_weight", known)
    return known[1]


def _make_weight(module: nn.Module) -> Weight | None:
    make = native.kernels().Weight
    if "bias" in module or module["weight"].dtype not in (mx.uint32, mx.float32, mx.float16, mx.bfloat16):
        return None
    if "scales" not in module:
        return make(module["weight"])
    return make(
        module["weight"], module["scales"], module.get("biases"), module.group_size, module.bits, module.mode
    )


def _is_alike(gate: Any, up: Any) -> bool:
    """Tell whether two matrices are stored alike: mixed recipes may differ."""
    kinds = [
        (type(m), *(getattr(m, k, None) for k in ("group_size", "bits", "mode")), m["weight"].dtype) for m in (gate, up)
    ]
    return kinds[0] == kinds[1] and all(
        gate.get(k) is None or gate[k].dtype == up[k].dtype for k in ("scales", "biases")
    )
