"""Operations on arrays and their bytes that MLX does slowly on a CPU, or not at all."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from m7mlx.cpu import native
from m7mlx.quantization import Quantization

_CPU = mx.Device(mx.cpu)
_PIECE = 1 << 18  # numbers, which fit into a processor's cache
_COLUMNS = 1024  # of the matrix that a tensor's words are summed over
_SLOW_EXP = sys.platform == "linux"
_LARGE = 1 << 14  # numbers; below, a dozen operations cost more than they save
_MANY = 1 << 17
_LOG2_E = 1.4426950408889634
_ROUND = 1.5 * 2**23  # added to a float32, it leaves no bits for a fraction
# 2^f for −½ ≤ f ≤ ½, highest power first: interpolated at the Chebyshev points
_POWERS = (
    *(0.001339086336353527, 0.009676031918255982, 0.05550357114222094),
    *(0.2402210748530968, 0.6931471880262273, 1.0000000754548972),
)
_EXPONENTS = {mx.float32: 0x7F800000, mx.float16: 0x7C00, mx.bfloat16: 0x7F80}  # all bits set: infinite or NaN


def on_cpu() -> bool:
    """Tell whether MLX computes on the processor, where 16-bit arithmetic is emulated and slow."""
    return mx.default_device() == _CPU


def has_kernels() -> bool:
    """Tell whether kernels of ours compute: on Linux's CPU backend, if they are built."""
    return on_cpu() and native.usable()


def softmax(x: mx.array) -> tuple[mx.array, mx.array | None]:
    """Compute the softmax over the last axis, in float32, as (powers, total): it is their quotient.

    A total of None stands for 1. A caller that multiplies by the softmax can divide the smaller
    result.
    """
    if not _is_slow(x):
        return mx.softmax(x, axis=-1, precise=True), None
    largest = x
    # One half is compared with the other: for many numbers, twice as fast as MLX's reduction.
    while x.size >= _MANY and (n := largest.shape[-1]) > 64:
        largest = mx.maximum(largest[..., : (n + 1) // 2], largest[..., n // 2 :])
    powers = _exp(x - mx.max(largest, axis=-1, keepdims=True))
    return powers, powers @ mx.ones((x.shape[-1], 1))  # four times as fast as MLX's sum


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Compute gate · sigmoid(gate) · up."""
    return _swiglu(gate, up) if _is_slow(gate) else nn.silu(gate) * up


def _is_slow(x: mx.array) -> bool:
    """Tell whether MLX would call the C library's `exp`: 9 ns a number, where `_exp` takes 1."""
    return _SLOW_EXP and x.size >= _LARGE and x.dtype == mx.float32 and on_cpu()


@mx.compile  # one pass over arrays that lie in order
def _exp(x: mx.array) -> mx.array:
    """Compute e to the x as 2^n · 2^f: a polynomial, and n added to the bits of its exponent.

    As exact as MLX's: 2e-7, and the rounding of x · log2 e. The result stays between 2^-100, which
    is lost in any sum with a 1, and 2^126.
    """
    y = mx.clip(x * _LOG2_E, -100.0, 126.0)
    rounded = y + _ROUND  # its lowest bits are now the integer n
    f = y - (rounded - _ROUND)
    power = f * _POWERS[0] + _POWERS[1]
    for coefficient in _POWERS[2:]:
        power = power * f + coefficient
    return (power.view(mx.int32) + (rounded.view(mx.int32) << 23)).view(mx.float32)


@mx.compile
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1 + _exp(-gate))


def dequantize(arrays: Mapping[str, mx.array], scheme: Quantization) -> mx.array:
    """Return the float32 weight that {"weight", "scales"[, "biases"]} stand for.

    It is computed in float32 even where the scales have 16 bits, which makes a weight of at most 8
    bits exact.
    """
    biases = arrays.get("biases")
    scales = arrays["scales"]
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        arrays["weight"],
        scales,
        biases,
        group_size=scheme.group_size,
        bits=scheme.bits,
        mode=scheme.mode,
        dtype=mx.float32,
    )


def nbytes(module: nn.Module) -> int:
    """Return the bytes of all arrays of a module."""
    return sum(array.nbytes for array in dict(tree_flatten(module.parameters())).values())


def raw_bytes(array: mx.array) -> memoryview:
    """Return an array's bytes, little-endian, row by row; copied only if they lie otherwise."""
    array = mx.contiguous(array)
    if array.dtype == mx.bfloat16:  # NumPy has no such type
        array = array.view(mx.uint16)
    return np.array(array, copy=False).reshape(-1).view(np.uint8).data


def is_finite(array: mx.array) -> bool:
    """Tell whether a float32, float16 or bfloat16 array holds neither NaN nor infinite numbers.

    Looks at the bits of the exponents, a piece at a time: on a CPU, 50 times as fast as
    `mx.isfinite`, and without further memory.
    """
    mask = np.array(_EXPONENTS[array.dtype], np.uint32 if array.dtype == mx.float32 else np.uint16)
    bits = np.frombuffer(raw_bytes(array), mask.dtype)
    pieces = (bits[start : start + _PIECE] for start in range(0, bits.size, _PIECE))
    return not any((piece & mask).max() == mask for piece in pieces)


def fingerprint(arrays: Mapping[str, mx.array]) -> str:
    """Hash names, types, shapes, and sums of rows and columns: any changed number shows.

    Sums, because the device makes them as fast as it reads memory; hashing 4 GB takes seconds.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        flat = array.reshape(-1)
        missing = -flat.nbytes % 4 // array.dtype.size  # to whole words
        words = (mx.concatenate([flat, mx.zeros((missing,), flat.dtype)]) if missing else flat).view(mx.uint32)
        whole = words.size // _COLUMNS * _COLUMNS
        matrix = words[:whole].reshape(-1, _COLUMNS)
        for part in (words[whole:], matrix.sum(axis=0), matrix.sum(axis=1)):
            if part.size:
                digest.update(raw_bytes(part))
    return digest.hexdigest()
