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
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, WeightsError
from m7mlx.files.weights import check_layer_count
from m7mlx.quantization import Quantization
from m7mlx.terminal import shown
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
_UNDERSTOOD = {  # what follows "llama." in a key
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",  # these three say nothing while the scaling's type is none
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "expert_used_count",  # nor this while there are no experts
    "tensor_data_layout",  # the interleaved one
}
# Keys → values that change nothing, and what other values mean.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "expert_count": ((0,), "mixtures of experts are"),
    "rope.scaling.type": (("none",), "scaled RoPE is"),
    "rope.scale_linear": ((1.0,), "scaled RoPE is"),
    "attention.causal": ((True,), "attention to later tokens is"),
    "use_parallel_residual": ((False,), "parallel residuals are"),
}


def open_gguf(path: Path) -> Source:
    """Open a GGUF file. Raises ConfigError, WeightsError, TokenizerError."""
    metadata, found = read_header(path)
    config, notes = _read_config(path, metadata, found)
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


def _read_config(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, GGUFTensor],
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the configuration, and notes on it. Raises ConfigError, WeightsError."""
    values = _architecture_values(path, metadata)
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{path}: tensor token_embd.weight is missing or no matrix")
    vocab_size = embedding.shape[0]
    try:
        heads, hidden = values["attention.head_count"], values["embedding_length"]
        config = ModelConfig(
            model_type="llama",
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=values["feed_forward_length"],
            n_layers=values["block_count"],
            n_heads=heads,
            n_kv_heads=values.get("attention.head_count_kv", heads),
            head_dim=values.get("attention.key_length") or values.get("rope.dimension_count") or hidden // heads,
            norm_eps=_decimal(values["attention.layer_norm_rms_epsilon"]),
            rope_theta=_decimal(values.get("rope.freq_base", 10000.0)),
            max_position_embeddings=values["context_length"],
            sliding_window=None,
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=next(iter(_ids(path, metadata, vocab_size, "bos")), None),
            eos_token_ids=_ids(path, metadata, vocab_size, "eos", "eot"),
        )
    except KeyError as error:
        raise ConfigError(f"{path}: llama.{error.args[0]} is missing from its metadata") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: its metadata cannot be understood ({error})") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if values.get("rope.dimension_count", config.head_dim) != config.head_dim:
        raise ConfigError(f"{path}: RoPE over a part of the head is not supported")
    if values.get("attention.value_length", config.head_dim) != config.head_dim:
        raise ConfigError(f"{path}: keys and values of different lengths are not supported")
    check_layer_count(path, config, len(tensors))
    return _with_window(config, values)


def _architecture_values(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under "llama.". Raises ConfigError for a key that is not understood."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{path}: architecture {shown(architecture)!r} is not supported; supported is llama (Mistral included)"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise ConfigError(f"{path} is one of several parts; join them with: llama-gguf-split --merge")
    values = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
    for key, value in values.items():
        neutral, meaning = _NEUTRAL.get(key, ((), "this kind of model is"))
        if key not in _UNDERSTOOD and value not in neutral:
            raise ConfigError(f"{path}: {meaning} not supported ({shown(f'llama.{key} = {value}')})")
    return values


def _decimal(number: Any) -> float:
    """Return the decimal that a float32 was rounded from: 9.99999974e-06 → 1e-05."""
    return float(str(np.float32(number)))


def _ids(path: Path, metadata: Mapping[str, Any], vocab_size: int, *names: str) -> tuple[int, ...]:
    """Return the token ids that the metadata names, each once."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in names]
    ids = [metadata[key] for key in keys if key in metadata]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ConfigError(f"{path}: token id {shown(token)} is not one of its {vocab_size} tokens")
    return tuple(dict.fromkeys(ids))


def _with_window(config: ModelConfig, values: Mapping[str, Any]) -> tuple[ModelConfig, tuple[str, ...]]:
    """Add the sliding window, which the format has no key for when the architecture is llama.

    Mistral 7B v0.1 and its fine-tunes are known by their shape and RoPE base: from v0.2 on, which
    has no window, the base is 1,000,000.
    """
    if window := values.get("attention.sliding_window"):
        return replace(config, model_type="mistral", sliding_window=window), ()
    shape = (config.hidden_size, config.intermediate_size, config.n_layers, config.n_heads, config.n_kv_heads)
    if shape == (4096, 14336, 32, 32, 8) and config.rope_theta == 10000.0:
        note = "this is Mistral 7B v0.1 by its shape: its sliding window of 4,096, which GGUF leaves out, is set"
        return replace(config, model_type="mistral", sliding_window=4096), (note,)
    return config, ()


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
