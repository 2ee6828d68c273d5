"""FP8 weights: codes of float8_e4m3fn, and the scales that they are multiplied by.

    transformers         weight_scale_inv  one, or one for each block of [128, 128]
    compressed-tensors   weight_scale      one, one for each row, or one for each block
    Mistral's own files  qscale_weight     one, or one for each row

A code has four significant bits: code · scale is exact in float32 where the scale has 16 bits, and
rounded once otherwise. The scales of activations, with which other runtimes make activations FP8
as well, are left out: here activations keep their precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, WeightsError
from m7mlx.files.weights import FLOATS, FP8, StoredTensor, check_layer_count
from m7mlx.terminal import shown
from m7mlx_convert.source import Arrays, Tensor, check_left, make_reader, open_floats

_SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight")
# The scales of activations, and those of a quantised cache.
_LEFT_OUT = ("activation_scale", "input_scale", "qscale_act", "k_scale", "v_scale", "q_scale", "kv_scale")
_FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors


class Blocks(NamedTuple):
    """How many rows and columns share a scale, where scales are those of blocks."""

    rows: int = 128
    columns: int = 128


def find_blocks(path: Path, given: Mapping[str, Any]) -> Blocks | None:
    """Return the blocks of FP8 weights, which have them or not; None for other ways of packing.

    path, given  a config.json, and its quantization_config, or what a params.json says of it

    Raises ConfigError for numbers that are not those of float8_e4m3fn.
    """
    method = str(given.get("quant_method")).replace("_", "-")
    if method == "compressed-tensors":
        first, *others = [scheme.get("block_structure") for scheme in _schemes(path, given)]
        if any(other != first for other in others):
            raise ConfigError(f"{path}: FP8 in blocks of several sizes cannot be read; convert the unquantised model")
        block: Any = first
    elif method == "fp8" or "qformat_weight" in given:
        kind = given.get("fmt") or given.get("qformat_weight") or "e4m3"
        if kind not in ("e4m3", "e4m3fn", "fp8_e4m3"):
            raise ConfigError(f"{path}: FP8 of the kind {shown(kind)} cannot be read; e4m3 can")
        block = given.get("weight_block_size")
    else:
        return None
    if block is None:
        return Blocks()
    if not isinstance(block, list) or len(block) != 2 or any(type(side) is not int or side < 1 for side in block):
        raise ConfigError(f"{path}: FP8 in blocks of {shown(block)} cannot be read; convert the unquantised model")
    return Blocks(*block)


def _schemes(path: Path, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return how compressed-tensors packed weights; raises ConfigError where that is not FP8."""
    groups = given.get("config_groups")
    named = groups.values() if isinstance(groups, Mapping) else ()
    found = [group.get("weights") if isinstance(group, Mapping) else None for group in named]
    schemes = [scheme for scheme in found if isinstance(scheme, Mapping)]
    is_fp8 = all(s.get("type") == "float" and s.get("num_bits") == 8 and s.get("symmetric", True) for s in schemes)
    if given.get("format") not in _FORMATS or not schemes or len(schemes) < len(found) or not is_fp8:
        raise ConfigError(
            f"{path}: weights compressed as {shown(given.get('format'))} cannot be read (float-quantized can); "
            "convert the unquantised model"
        )
    return schemes


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales: of a weight, of activations or of a cache."""
    return name.rpartition(".")[2] in (*_SCALES, *_LEFT_OUT)


def list_notes(headers: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Return what the user should know of the scales among these tensors."""
    if not any(name.rpartition(".")[2] in _LEFT_OUT for name in headers):
        return ()
    return ("the scales of FP8 activations are left out: here activations keep their precision",)


def list_tensors(
    folder: Path,
    config: ModelConfig,
    headers: Mapping[str, StoredTensor],
    blocks: Blocks,
    named: mx.Dtype,
) -> dict[str, Tensor]:
    """Return the parameters by name. Raises WeightsError where files and config differ.

    named  the type that FP8 weights expand to
    """
    check_layer_count(folder, config, len(headers))
    found = {}
    for name, shape in config.weight_shapes().items():
        stored = headers.get(name)
        if stored is not None and stored.dtype == FP8:
            found[name] = open_float8(folder, name, shape, headers, blocks, named)
        else:
            found[name] = open_floats(folder, name, shape, headers)
    check_left(folder, config, (name for name in headers.keys() - found.keys() if not is_scale(name)))
    return found


def open_float8(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    headers: Mapping[str, StoredTensor],
    blocks: Blocks,
    named: mx.Dtype,
) -> Tensor:
    """Return an FP8 matrix as what its codes and scales make.

    name   of the tensor that holds the codes
    shape  that the configuration says
    named  the type that it expands to

    Raises WeightsError where the scales do not fit.
    """
    module = name.removesuffix(".weight")
    scales = [f"{module}.{kind}" for kind in _SCALES if f"{module}.{kind}" in headers]
    if len(scales) != 1:
        raise WeightsError(f"{folder}: {name} is FP8 and has {'several scales' if scales else 'no scale'} beside it")
    codes, scale = headers[name], headers[scales[0]]
    if codes.shape != shape or len(shape) != 2:
        raise WeightsError(f"{folder}: {name} is FP8 {list(codes.shape)}; its config says {list(shape)}")
    shared = _sharing(scale.shape, shape, blocks)
    if shared is None or scale.dtype not in FLOATS:
        raise WeightsError(
            f"{folder}: {scales[0]} is {scale.dtype} {list(scale.shape)}, which does not fit {name} {list(shape)}"
        )
    read = make_reader(headers, {"codes": name, "scale": scales[0]})
    return Tensor(shape, named, _expanded(read, shape, shared), is_widened=True)


def _sharing(scale: tuple[int, ...], shape: tuple[int, ...], blocks: Blocks) -> Blocks | None:
    """Return how many rows and columns share each scale of this shape; None for odd ones."""
    rows, columns = shape
    if math.prod(scale) == 1:
        return Blocks(rows, columns)
    if scale in ((rows,), (rows, 1)):
        return Blocks(1, columns)
    return blocks if scale == (-(-rows // blocks.rows), -(-columns // blocks.columns)) else None


def _expanded(
    read: Callable[[], Arrays],
    shape: tuple[int, ...],
    shared: Blocks,
) -> Callable[[], Arrays]:
    """Return a `Tensor.read` that gives float32."""
    rows, columns = shape

    def expand() -> Arrays:
        stored = read()
        weight = mx.from_fp8(stored["codes"], mx.float32)
        scale = stored["scale"].astype(mx.float32).reshape(-(-rows // shared.rows), -(-columns // shared.columns))
        scale = mx.repeat(scale, shared.columns, axis=1)[:, :columns]
        whole = rows // shared.rows  # the last block may have fewer rows
        blocks = weight[: whole * shared.rows].reshape(whole, shared.rows, columns) * scale[:whole, None]
        rest = weight[whole * shared.rows :] * scale[whole:]
        return {"weight": mx.concatenate([blocks.reshape(-1, columns), rest]) if rest.size else blocks.reshape(shape)}

    return expand
