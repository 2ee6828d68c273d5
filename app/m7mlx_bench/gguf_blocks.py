"""MLX's quantised matrices in the types of GGUF: the same codes, laid out in GGUF's blocks.

MLX has w = scale · q + bias, for groups of 32, 64 or 128. GGUF's simple types keep a scale, or a
scale and a minimum, for 32 numbers; where the bias is −2^(bits − 1) · scale, the type without a
minimum says the same. For 2, 3 and 6 bits there are K types alone, whose blocks of 256 numbers
share a scale: they hold such matrices only if 256 numbers have one scale, as random ones do
(gguf-py, `quants.py`, reads all of them).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind

from m7mlx.errors import InputError
from m7mlx.quantization import Quantization

Bytes = Any  # uint8: NumPy's types lose it in every operation
Numbers = np.ndarray[Any, np.dtype[np.float32]]
_BLOCK, _SUPER = 32, 256  # numbers in a block: of simple types, of K types
_PLAIN = {4: Kind.Q4_0, 5: Kind.Q5_0, 8: Kind.Q8_0}  # bits → type, with w = scale · (q − 2^(bits − 1))
_WITH_MINIMUM = {4: Kind.Q4_1, 5: Kind.Q5_1}
_K = {2: Kind.Q2_K, 3: Kind.Q3_K, 6: Kind.Q6_K}


def choose_type(scheme: Quantization, columns: int, scales: Numbers, biases: Numbers) -> Kind:
    """Return the type of GGUF that holds a matrix of so many columns.

    scales, biases  [rows, groups]

    Raises InputError if there is none.
    """
    bits = scheme.bits
    is_plain = bool((biases == scales * -(1 << (bits - 1))).all())
    if bits in _K:
        if columns % _SUPER or not is_plain or (scales != scales[:, :1]).any():
            raise InputError(f"GGUF has no type that holds these numbers in {bits} bits")
        return _K[bits]
    if is_plain:
        return _PLAIN[bits]
    if bits not in _WITH_MINIMUM:
        raise InputError(f"GGUF has no type for {bits} bits with a minimum")
    return _WITH_MINIMUM[bits]


def pack(kind: Kind, scheme: Quantization, words: Any, scales: Numbers, biases: Numbers) -> Bytes:
    """Return the blocks of a matrix, [rows, bytes].

    words           MLX's packed codes, uint32 [rows, columns · bits / 32]
    scales, biases  [rows, groups]
    """
    rows, columns = len(words), words.shape[1] * 32 // scheme.bits
    size = _SUPER if kind in _K.values() else _BLOCK
    wide = columns // scales.shape[1]  # numbers of a group
    blocks = [_half(each, wide, size) for each in (scales, biases)]
    parts = _FORMS[kind](words if scheme.bits == 4 else _codes(words, scheme, columns), *blocks)
    return np.concatenate([part.view(np.uint8) for part in parts], axis=1).reshape(rows, -1)


def _half(numbers: Numbers, wide: int, size: int) -> Any:
    """Return a number of each group as float16 for each block: [blocks, 1]."""
    by_block = np.repeat(numbers, wide // size, axis=1) if wide >= size else numbers[:, :: size // wide]
    return by_block.astype(np.float16).reshape(-1, 1)


def _codes(words: Any, scheme: Quantization, columns: int) -> Bytes:
    """Unpack codes: [rows, columns]."""
    ones = mx.ones((len(words), columns // scheme.group_size))
    plain = mx.dequantize(mx.array(words), ones, mx.zeros_like(ones), scheme.group_size, scheme.bits)
    return np.array(plain.astype(mx.uint8))


def _nibbles(words: Any) -> Bytes:
    """Lay 4-bit codes out as GGUF has them: code j of a block beside code j + 16, [blocks, 16].

    MLX has code 2 j beside code 2 j + 1.
    """
    halves = words.view(np.uint8).reshape(-1, 2, _BLOCK // 4)
    low, high = halves[:, 0], halves[:, 1]
    found = np.empty((len(halves), _BLOCK // 2), np.uint8)
    found[:, 0::2] = (low & 15) | (high << 4)
    found[:, 1::2] = (low >> 4) | (high & 240)
    return found


def _fifths(codes: Bytes) -> list[Bytes]:
    """Lay 5-bit codes out: the fifth bits, [blocks, 4], and the rest, [blocks, 16]."""
    by_block = codes.reshape(-1, 2, _BLOCK // 2)
    top = np.packbits(codes.reshape(-1, _BLOCK) >> 4, axis=1, bitorder="little")
    return [top, (by_block[:, 0] & 15) | (by_block[:, 1] << 4)]


def _quarters(codes: Bytes) -> Bytes:
    """Lay 2-bit codes out, four runs of 32 in the same 32 bytes: [blocks, 64]."""
    runs = codes.reshape(-1, 2, 4, 32)
    return (runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6).reshape(-1, 64)


def _same(byte: int, count: int, like: Any) -> Bytes:
    """Return the packed scales of a super-block's 16 groups, all alike: [blocks, count]."""
    return np.full((len(like), count), byte, np.uint8)


def _q2(codes: Bytes, d: Any, m: Any) -> list[Any]:
    return [_same(0x11, 16, d), _quarters(codes), d, -m]  # every scale and every minimum is 1


def _q3(codes: Bytes, d: Any, m: Any) -> list[Any]:
    high = np.packbits(codes.reshape(-1, 8, 32) >> 2, axis=1, bitorder="little").reshape(-1, 32)
    scales = np.concatenate([_same(0x11, 8, d), _same(0xAA, 4, d)], axis=1)  # every one is 33 − 32
    return [high, _quarters(codes & 3), scales, d]


def _q6(codes: Bytes, d: Any, m: Any) -> list[Any]:
    runs = codes.reshape(-1, 2, 2, 64) & 15
    low = (runs[:, :, 0] | runs[:, :, 1] << 4).reshape(-1, 128)
    return [low, _quarters(codes >> 4), _same(1, 16, d), d]


_FORMS = {  # packed 4-bit words, or codes; scales; biases → the parts of the blocks, in order
    Kind.Q4_0: lambda words, d, m: [d, _nibbles(words)],
    Kind.Q4_1: lambda words, d, m: [d, m, _nibbles(words)],
    Kind.Q5_0: lambda codes, d, m: [d, *_fifths(codes)],
    Kind.Q5_1: lambda codes, d, m: [d, m, *_fifths(codes)],
    Kind.Q8_0: lambda codes, d, m: [d, codes.reshape(-1, _BLOCK) ^ 128],
    Kind.Q2_K: _q2,
    Kind.Q3_K: _q3,
    Kind.Q6_K: _q6,
}
