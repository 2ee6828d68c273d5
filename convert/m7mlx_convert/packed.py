"""AWQ and GPTQ checkpoints: packed integers that become MLX's affine quantisation.

MLX has w = scale · q + bias. Both store a matrix [out, in] transposed, with w = scale · (q − zero),
so bias = −zero · scale:

    AWQ   qweight [in, out / 8]  eight outputs to a word, in the order 0 2 4 6 1 3 5 7
                                 (AutoAWQ, `packing_utils.py`)
    GPTQ  qweight [in / 8, out]  eight inputs to a word, in order; zeros are stored one too low,
                                 0 as the highest number, except in "gptq_v2" (AutoGPTQ,
                                 `qlinear_cuda.py`)

`qzeros` [groups, out / 8] is packed like AWQ's qweight, or in order; `scales` is [groups, out].
Files that say GPTQ and have AWQ's shapes are read as AWQ, which is how mlx-lm reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, WeightsError
from m7mlx.files.weights import DTYPES, StoredTensor, check_layer_count
from m7mlx.quantization import Quantization
from m7mlx.terminal import shown
from m7mlx_convert.source import Arrays, Tensor, check_left, make_reader, open_floats

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where output i lies within its word, in steps of 4 bits


class Packing(NamedTuple):
    """A way of packing weights, as config.json names it."""

    scheme: Quantization
    zero_offset: int  # what GPTQ's layout adds to a stored zero


def find_packing(path: Path, given: Mapping[str, Any]) -> Packing:
    """Return how the weights beside the config.json at `path` are packed.

    given  its quantization_config

    Raises ConfigError for other methods than AWQ and GPTQ.
    """
    name: Any = given.get("quant_method")
    bits: Any = given.get("bits")
    group: Any = given.get("group_size")
    if name not in ("awq", "gptq"):
        raise ConfigError(
            f"{path}: weights quantised by {shown(name)} cannot be read (AWQ, GPTQ, FP8 and MLX's can); "
            "convert the unquantised model"
        )
    if bits not in ((4,) if name == "awq" else (2, 4, 8)) or group not in (32, 64, 128):
        raise ConfigError(
            f"{path}: {name} with {shown(bits)} bits in groups of {shown(group)} has no counterpart in MLX; "
            "convert the unquantised model"
        )
    if name == "awq":
        return Packing(Quantization(group, bits), 0)
    layout = given.get("checkpoint_format") or given.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise ConfigError(f"{path}: GPTQ in the layout {shown(layout)} cannot be read; convert the unquantised model")
    return Packing(Quantization(group, bits), int(layout == "gptq"))


def list_tensors(
    folder: Path,
    config: ModelConfig,
    headers: Mapping[str, StoredTensor],
    packing: Packing,
) -> dict[str, Tensor]:
    """Return the parameters by name. Raises WeightsError where files and config differ."""
    check_layer_count(folder, config, len(headers))
    found, known = {}, set()
    for name, shape in config.weight_shapes().items():
        module = name.removesuffix(".weight")
        if f"{module}.qweight" in headers:
            found[name] = _packed(folder, module, shape, headers, packing)
            known |= {f"{module}.{kind}" for kind in ("qweight", "qzeros", "scales", "g_idx")}
            if _is_without_effect(folder, f"{module}.bias", headers):
                known.add(f"{module}.bias")
            continue
        found[name] = open_floats(folder, name, shape, headers)
        known.add(name)
    check_left(folder, config, headers.keys() - known)
    return found


def _packed(
    folder: Path,
    module: str,
    shape: tuple[int, ...],
    headers: Mapping[str, StoredTensor],
    packing: Packing,
) -> Tensor:
    """Return one packed matrix. Raises WeightsError where its tensors do not fit each other."""
    rows, columns = shape
    bits, group = packing.scheme.bits, packing.scheme.group_size
    per_word = 32 // bits
    if rows % per_word or columns % group:
        raise WeightsError(f"{folder}: {module} [{rows}, {columns}] cannot be packed in groups of {group}")
    layouts: dict[tuple[int, ...], bool] = {(columns, rows // per_word): True, (columns // per_word, rows): False}
    words = headers[f"{module}.qweight"]
    is_awq = layouts.get(words.shape)
    if words.dtype != "I32" or is_awq is None or (is_awq and bits != 4):
        raise WeightsError(
            f"{folder}: {module}.qweight is {words.dtype} {list(words.shape)}, neither AWQ's layout nor GPTQ's"
        )
    expected = {"scales": ("F16", "BF16", "F32"), "qzeros": ("I32",)}
    shapes = {"scales": (columns // group, rows), "qzeros": (columns // group, rows // per_word)}
    for kind, dtypes in expected.items():
        stored = headers.get(f"{module}.{kind}")
        if stored is None and kind == "qzeros":
            continue  # symmetric: every zero is in the middle
        if stored is None or stored.dtype not in dtypes or stored.shape != shapes[kind]:
            actual = f"is {stored.dtype} {list(stored.shape)}" if stored else "is missing"
            raise WeightsError(f"{folder}: {module}.{kind} {actual}; it should be {list(shapes[kind])}")
    _check_order(folder, module, columns, group, headers)
    kinds = [kind for kind in ("qweight", "scales", "qzeros") if f"{module}.{kind}" in headers]
    read = make_reader(headers, {kind: f"{module}.{kind}" for kind in kinds})
    dtype = DTYPES[headers[f"{module}.scales"].dtype]
    offset = 0 if is_awq else packing.zero_offset
    return Tensor(shape, dtype, _repacked(read, bits, is_awq, offset), packing.scheme, packing.scheme)


def _is_without_effect(folder: Path, name: str, headers: Mapping[str, StoredTensor]) -> bool:
    """Return whether there is a bias of zeros, as old quantisers wrote for every matrix.

    Raises WeightsError for a bias that does something.
    """
    stored = headers.get(name)
    if stored is None or stored.dtype not in ("F32", "F16", "BF16"):
        return False
    if stored.path.is_file() and mx.any(make_reader(headers, {"bias": name})()["bias"] != 0).item():
        raise WeightsError(
            f"{folder}: {name} is not zero, and the model has no biases; convert the unquantised model"
        )
    return True


def _check_order(folder: Path, module: str, columns: int, group: int, headers: Mapping[str, StoredTensor]) -> None:
    """Raise WeightsError where a group's columns are not neighbours ("act-order")."""
    if f"{module}.g_idx" not in headers or not headers[f"{module}.g_idx"].path.is_file():
        return
    order = np.array(make_reader(headers, {"g_idx": f"{module}.g_idx"})()["g_idx"])
    if order.shape != (columns,) or not np.array_equal(order, np.arange(columns) // group):
        raise WeightsError(
            f"{folder}: {module} was quantised in activation order (g_idx), which MLX cannot express; "
            "convert the unquantised model"
        )


def _repacked(read: Callable[[], Arrays], bits: int, is_awq: bool, zero_offset: int) -> Callable[[], Arrays]:
    """Return a `Tensor.read` that packs anew what `read` gives."""

    def repack() -> Arrays:
        stored = read()
        scales = mx.contiguous(stored["scales"].T)
        words = stored["qweight"].view(mx.uint32)
        # [out, in]
        q = _unpack(words, bits, is_awq).T if is_awq else _unpack(words.T, bits, is_awq)
        if "qzeros" in stored:
            # A zero of 0, less one, was stored as all bits set: the sum wraps, as in AutoGPTQ.
            zeros = (_unpack(stored["qzeros"].view(mx.uint32), bits, is_awq).T + zero_offset) & ((1 << bits) - 1)
            zeros = zeros.astype(mx.float32)
        else:
            zeros = mx.array(float(1 << (bits - 1)))
        biases = -zeros * scales.astype(mx.float32)
        return {"weight": _pack(q, bits), "scales": scales, "biases": biases.astype(scales.dtype)}

    return repack


def _unpack(words: mx.array, bits: int, is_awq: bool) -> mx.array:
    """Unpack uint32 [rows, words] to uint32 [rows, words · 32 / bits]."""
    shifts = mx.array(_AWQ_ORDER, mx.uint32) * 4 if is_awq else mx.arange(0, 32, bits, mx.uint32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).reshape(words.shape[0], -1)


def _pack(q: mx.array, bits: int) -> mx.array:
    """Undo `_unpack`, in MLX's order: the earlier weight lies lower."""
    shifts = mx.arange(0, 32, bits, mx.uint32)
    return (q.reshape(q.shape[0], -1, 32 // bits) << shifts).sum(axis=-1).astype(mx.uint32)
