"""GGUF files → the same tensors, names and numbers as a Hugging Face folder holds.

Quantised blocks of Q4_0, Q4_1 and Q8_0 (32 weights each) are kept without loss: MLX's affine quantisation
with groups of 32 is w = scale · q + bias, and these are

    Q4_0  w = d · (q − 8)     scale d, bias −8 d
    Q4_1  w = d · q + m       scale d, bias m
    Q8_0  w = d · q, signed   scale d, bias −128 d, with q + 128 stored

Other types are expanded. Query and key rows are stored for interleaved RoPE and are put back into the
rotate-half order (llama.cpp, convert_hf_to_gguf.py, `permute`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from m7mlx.config import ModelConfig, Quantization
from m7mlx.errors import ConfigError, M7Error, WeightsError
from m7mlx_convert.gguf_header import check_header
from m7mlx_convert.gguf_tokenizer import tokenizer_files
from m7mlx_convert.source import Source, Tensor

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
    """Read a GGUF file's metadata and plan its tensors. Raises ConfigError, WeightsError, TokenizerError."""
    check_header(path)
    try:
        from gguf import GGUFReader

        reader = GGUFReader(str(path))
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except M7Error:
        raise
    except Exception as error:  # the reader raises whatever its parsing stumbles over
        raise WeightsError(f"{path} is not a sound GGUF file ({error})") from None
    found = {tensor.name: tensor for tensor in reader.tensors}
    config, notes = _config(path, metadata, found)
    tensors = dict(_tensors(path, config, found))
    expanded = {t.tensor_type.name for t in found.values()} - _KEPT.keys() - _PLAIN
    if expanded:
        notes += (f"{', '.join(sorted(expanded))} weights are expanded to float16; add --q-bits 4 to quantise them",)
    return Source(
        name=str(metadata.get("general.name") or path.stem),
        config=config,
        raw_config=config.to_dict(),
        tensors=tensors,
        files=tokenizer_files(path, metadata),
        licence=metadata.get("general.license"),
        notes=notes,
    )


def _config(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[ModelConfig, tuple[str, ...]]:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{path}: architecture {architecture!r} is not supported; supported is llama (Mistral included)"
        )
    values = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
    if values.get("expert_count"):
        raise ConfigError(f"{path}: mixtures of experts are not supported; only dense models are")
    if values.get("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise ConfigError(f"{path}: scaled RoPE is not supported; only plain RoPE is")
    tokenizer = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
    ends = [tokenizer[k] for k in ("eos_token_id", "eot_token_id") if tokenizer.get(k) is not None]
    try:
        heads, hidden = values["attention.head_count"], values["embedding_length"]
        config = ModelConfig(
            model_type="llama",
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            hidden_size=hidden,
            intermediate_size=values["feed_forward_length"],
            n_layers=values["block_count"],
            n_heads=heads,
            n_kv_heads=values.get("attention.head_count_kv", heads),
            head_dim=values.get("attention.key_length") or values.get("rope.dimension_count") or hidden // heads,
            norm_eps=float(np.float32(values["attention.layer_norm_rms_epsilon"]).astype(str)),
            rope_theta=float(values.get("rope.freq_base", 10000.0)),
            max_position_embeddings=values["context_length"],
            sliding_window=None,
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=tokenizer.get("bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(ends)),
        )
    except KeyError as error:
        raise ConfigError(f"{path}: {error.args[0]!r} is missing from its metadata") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: its metadata cannot be understood ({error})") from None
    if values.get("rope.dimension_count", config.head_dim) != config.head_dim:
        raise ConfigError(f"{path}: RoPE over a part of the head is not supported")
    return _with_window(config, values)


def _with_window(config: ModelConfig, values: Mapping[str, Any]) -> tuple[ModelConfig, tuple[str, ...]]:
    """The sliding window, which the format has no key for when the architecture is llama.

    Mistral 7B v0.1 and its fine-tunes are known by their shape and RoPE base: from v0.2 on, which has no
    window, the base is 1,000,000.
    """
    if window := values.get("attention.sliding_window"):
        return replace(config, model_type="mistral", sliding_window=window), ()
    shape = (config.hidden_size, config.intermediate_size, config.n_layers, config.n_heads, config.n_kv_heads)
    if shape == (4096, 14336, 32, 32, 8) and config.rope_theta == 10000.0:
        note = "this is Mistral 7B v0.1 by its shape: its sliding window of 4,096, which GGUF leaves out, is set"
        return replace(config, model_type="mistral", sliding_window=4096), (note,)
    return config, ()


def _tensors(path: Path, config: ModelConfig, found: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    names = {name: _gguf_name(name) for name in config.weight_shapes()}
    kinds = [t.tensor_type.name for t in found.values()]
    # One type for all, the norms' float32 included: mixed types would compute in float32.
    dtype = mx.bfloat16 if kinds.count("BF16") > kinds.count("F16") else mx.float16
    for extra in sorted(found.keys() - set(names.values())):
        raise WeightsError(f"{path}: tensor {extra} is not a part of a Mistral-like model")
    for name, shape in config.weight_shapes().items():
        tensor = found.get(names[name])
        if tensor is None:
            raise WeightsError(f"{path}: tensor {names[name]} is missing")
        if tuple(int(n) for n in reversed(tensor.shape)) != shape:
            stored = [int(n) for n in reversed(tensor.shape)]
            raise WeightsError(f"{path}: {names[name]} has shape {stored}, its metadata says {list(shape)}")
        order = _row_order(config, name)
        kind = tensor.tensor_type.name
        if kind in _KEPT and len(shape) == 2:
            scheme = Quantization(_GROUP, _KEPT[kind])
            yield name, Tensor(shape, mx.float16, _kept(tensor, kind, order), scheme)
        else:
            yield name, Tensor(shape, dtype, _expanded(tensor, kind, shape, order))


def _gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return _NAMES[module] + ".weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def _row_order(config: ModelConfig, name: str) -> np.ndarray | None:
    """For query and key projections: which stored row is row i; whole rows move, so blocks stay whole."""
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    pairs = np.arange(heads * config.head_dim).reshape(heads, config.head_dim // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def _kept(tensor: Any, kind: str, order: np.ndarray | None) -> Callable[[], dict[str, mx.array]]:
    def read() -> dict[str, mx.array]:
        data = tensor.data if order is None else tensor.data[order]
        return {k: mx.array(v) for k, v in repack(data, kind).items()}

    return read


def repack(data: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Blocks uint8 [rows, bytes] → weight uint32 [rows, columns · bits / 32], scales, biases [rows, columns / 32]."""
    halves = 2 if kind == "Q4_1" else 1  # float16 numbers at the start of a block
    size = 2 * halves + _GROUP * _KEPT[kind] // 8
    blocks = data.reshape(data.shape[0], -1, size)
    numbers = np.ascontiguousarray(blocks[..., : 2 * halves]).view(np.float16)
    scales, quants = numbers[..., 0], blocks[..., 2 * halves :]
    if kind == "Q8_0":
        packed = quants ^ 0x80  # signed → unsigned, 128 up
        biases = scales * np.float16(-128)
    else:
        # A byte holds weight i low and weight i + 16 high; MLX wants neighbours, the earlier one low.
        q = np.concatenate([quants & 0xF, quants >> 4], axis=-1)
        packed = q[..., 0::2] | (q[..., 1::2] << 4)
        biases = numbers[..., 1] if kind == "Q4_1" else scales * np.float16(-8)
    weight = np.ascontiguousarray(packed).view(np.uint32).reshape(data.shape[0], -1)
    return {"weight": weight, "scales": np.ascontiguousarray(scales), "biases": np.ascontiguousarray(biases)}


def _expanded(
    tensor: Any, kind: str, shape: tuple[int, ...], order: np.ndarray | None
) -> Callable[[], dict[str, mx.array]]:
    def read() -> dict[str, mx.array]:
        from gguf import dequantize

        array = tensor.data if kind in ("F32", "F16") else dequantize(tensor.data, tensor.tensor_type)
        array = array.reshape(shape)
        return {"weight": mx.array(np.ascontiguousarray(array if order is None else array[order]))}

    return read
