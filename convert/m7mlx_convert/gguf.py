"""GGUF files, read as the tensors, names and numbers that a Hugging Face folder holds.

Quantised blocks of Q4_0, Q4_1 and Q8_0 (32 weights each) are kept without loss: MLX's affine
quantisation with groups of 32 is w = scale · q + bias, and these are

    Q4_0  w = d · (q − 8)     scale d, bias −8 d
    Q4_1  w = d · q + m       scale d, bias m
    Q8_0  w = d · q, signed   scale d, bias −128 d, with q + 128 stored

Other types are expanded. Query and key rows are stored for interleaved RoPE and are put back into
the rotate-half order (llama.cpp, convert_hf_to_gguf.py, `permute`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from m7mlx.config import ModelConfig
from m7mlx.errors import WeightsError
from m7mlx.quantization import Quantization
from m7mlx.terminal import shown
from m7mlx_convert.gguf_config import read_config
from m7mlx_convert.gguf_header import GGUFTensor, read_header
from m7mlx_convert.gguf_tokenizer import tokenizer_files
from m7mlx_convert.native import native_name, row_order
from m7mlx_convert.source import Arrays, Source, Tensor

_GROUP = 32
_KEPT = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}  # block type → bits
_PLAIN = {"F32", "F16", "BF16"}
_NAMES = {  # name on disk → name in the file
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def open_gguf(path: Path) -> Source:
    """Open a GGUF file. Raises ConfigError, WeightsError, TokenizerError."""
    metadata, found = read_header(path)
    config, notes = read_config(path, metadata, {name: tensor.shape for name, tensor in found.items()})
    tensors = dict(_list_tensors(path, config, found))
    expanded = {t.kind for t in found.values()} - _KEPT.keys() - _PLAIN
    if expanded:
        notes += (f"MLX has no counterpart of {', '.join(sorted(expanded))}: these weights are expanded to float16",)
    name, licence = metadata.get("general.name"), metadata.get("general.license")
    return Source(
        name=shown(name or path.stem),
        config=config,
        raw_config=config.to_dict(),
        tensors=tensors,
        files=tokenizer_files(path, metadata),
        weight_files=(path,),
        licence=licence if isinstance(licence, str) else None,
        notes=notes,
    )


def _list_tensors(path: Path, config: ModelConfig, found: Mapping[str, GGUFTensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's parameters by name. Raises WeightsError for what does not fit."""
    names = {name: native_name(name, _NAMES, "blk") for name in config.weight_shapes()}
    for extra in sorted(found.keys() - set(names.values())):
        if extra != "rope_freqs.weight" or not _is_ones(found[extra]):
            raise WeightsError(f"{path}: tensor {shown(extra)} is not a part of a plain Mistral-like model")
    for kind in {t.kind for t in found.values()} - _KEPT.keys():
        _check_kind(path, kind)
    dtype = _float_dtype({found[n].kind for n in names.values() if n in found and len(found[n].shape) == 2})
    for name, shape in config.weight_shapes().items():
        tensor = found.get(names[name])
        if tensor is None:
            raise WeightsError(f"{path}: tensor {names[name]} is missing")
        if tensor.shape != shape:
            raise WeightsError(
                f"{path}: {names[name]} has shape {list(tensor.shape)}, its metadata says {list(shape)}"
            )
        order = row_order(config, name)
        if tensor.kind in _KEPT and len(shape) == 2:
            scheme = Quantization(_GROUP, _KEPT[tensor.kind])
            yield name, Tensor(shape, mx.float16, _kept(tensor, order), scheme, scheme)
        else:
            yield name, Tensor(shape, dtype, _expanded(tensor, order))


def _float_dtype(kinds: set[str]) -> mx.Dtype:
    """Return one type for all that is not quantised, by the types of the matrices.

    Norms are float32 in every file; one float32 tensor would make all activations float32, at half
    the speed.
    """
    if kinds == {"F32"}:
        return mx.float32
    return mx.bfloat16 if kinds <= {"BF16", "F32"} else mx.float16


def _check_kind(path: Path, kind: str) -> None:
    """Raise WeightsError unless the `gguf` package can expand a block of zeros of this type."""
    # Slow to import, and this module is imported for every conversion.
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    ggml = GGMLQuantizationType[kind]
    try:
        dequantize(np.zeros(GGML_QUANT_SIZES[ggml][1], np.uint8), ggml)
    except Exception:  # NotImplementedError, or whatever else a type without an expansion raises
        raise WeightsError(f"{path}: tensors of type {kind} are not supported") from None


def _is_ones(tensor: GGUFTensor) -> bool:
    return tensor.kind == "F32" and bool((tensor.read().view(np.float32) == 1).all())


def _kept(tensor: GGUFTensor, order: np.ndarray | None) -> Callable[[], Arrays]:
    """Return a `Tensor.read` that keeps the blocks, their rows in this order."""

    def read() -> Arrays:
        data = tensor.read()
        return {k: mx.array(v) for k, v in repack(data if order is None else data[order], tensor.kind).items()}

    return read


def repack(data: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Turn blocks uint8 [rows, bytes] into MLX's arrays.

    They are weight, uint32 [rows, columns · bits / 32], scales and biases [rows, columns / 32].
    Multiplying a float16 by a power of two is exact, except that 8 d and 128 d may overflow: that
    gives an infinite bias, which the conversion refuses.
    """
    halves = 2 if kind == "Q4_1" else 1  # float16 numbers at the start of a block
    size = 2 * halves + _GROUP * _KEPT[kind] // 8
    blocks = data.reshape(data.shape[0], -1, size)
    numbers = np.ascontiguousarray(blocks[..., : 2 * halves]).view(np.float16)
    scales, quants = numbers[..., 0], blocks[..., 2 * halves :]
    if kind == "Q8_0":
        packed = quants ^ 0x80  # signed → unsigned, 128 up
    else:
        # A byte holds weight i low and weight i + 16 high; MLX has neighbours, the earlier low.
        q = np.concatenate([quants & 0xF, quants >> 4], axis=-1)
        packed = q[..., 0::2] | (q[..., 1::2] << 4)
    with np.errstate(over="ignore", invalid="ignore"):
        biases = numbers[..., 1] if kind == "Q4_1" else scales * np.float16(-128 if kind == "Q8_0" else -8)
    weight = np.ascontiguousarray(packed).view(np.uint32).reshape(data.shape[0], -1)
    return {"weight": weight, "scales": np.ascontiguousarray(scales), "biases": np.ascontiguousarray(biases)}


def _expanded(tensor: GGUFTensor, order: np.ndarray | None) -> Callable[[], Arrays]:
    """Return a `Tensor.read` that expands the blocks, their rows in this order."""

    def read() -> Arrays:
        from gguf import GGMLQuantizationType, dequantize  # slow to import

        data = tensor.read()
        if tensor.kind == "F16":
            array = data.view(np.float16)
        else:
            # What is not finite is refused later, by name.
            with np.errstate(over="ignore", invalid="ignore"):
                array = dequantize(data, GGMLQuantizationType[tensor.kind])
        return {"weight": mx.array((array if order is None else array[order]).reshape(tensor.shape))}

    return read
