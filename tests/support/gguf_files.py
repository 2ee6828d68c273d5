"""GGUF files, by the `gguf` package's own writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from m7mlx_convert.gguf_tokenizer import tokenizer_files
from models import mistral_file, random_weights, small_config
from sentencepiece import SentencePieceProcessor
from sources import permuted, tokenizer_json

from m7mlx.config import ModelConfig
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer

NAMES = {
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
# A Llama with the numbers that these files have where they say nothing, and Mistral's vocabulary.
TINY = small_config(
    model_type="llama",
    vocab_size=32000,
    hidden_size=64,
    intermediate_size=96,
    head_dim=16,
    sliding_window=None,
    norm_eps=1e-5,
    rope_theta=1e4,
)


def gguf_config(**changes: Any) -> ModelConfig:
    """A model with as many ids as `tokenizer_metadata` has."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "n_layers": 2, "sliding_window": None}
    return small_config(**{"model_type": "llama", "bos_token_id": 0, "eos_token_ids": (1,)} | sizes | changes)


def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random weights that float16 holds without loss, as those of published models."""
    return {name: array.astype(np.float16).astype(np.float32) for name, array in random_weights(config).items()}


def gguf_name(name: str) -> str:
    """What llama.cpp calls a parameter."""
    module = name.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    layer, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.weight"


def stored(config: ModelConfig, kinds: Mapping[str, Kind], default: Kind) -> dict[str, tuple[np.ndarray, Kind]]:
    """What a GGUF file of this model holds: name → bytes, type.

    Norms are F32, as llama.cpp writes them.
    """
    tensors = {}
    for name, array in weights_of(config).items():
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
        array = permuted(array, heads) if heads else array
        kind = Kind.F32 if array.ndim == 1 else kinds.get(name, default)
        tensors[gguf_name(name)] = gguf.quants.quantize(array, kind), kind
    return tensors


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    """What describes this model."""
    return {
        "llama.block_count": config.n_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
    } | tokenizer_metadata()


def tokenizer_metadata() -> dict[str, Any]:
    """A byte-level tokenizer of 259 tokens, as metadata."""
    tokens = [*tokenizer_json()["model"]["vocab"], "ab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def write_gguf(
    path: Path,
    config: ModelConfig,
    default: Kind = Kind.F16,
    kinds: Mapping[str, Kind] | None = None,
    changes: Mapping[str, Any] | None = None,
    architecture: str = "llama",
    extra: Mapping[str, tuple[np.ndarray, Kind]] | None = None,
) -> dict[str, tuple[np.ndarray, Kind]]:
    """A GGUF file by the `gguf` package's own writer.

    `changes` to the metadata, None takes a key out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata_of(config) | dict(changes or {})).items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_array(key, value)
    tensors = stored(config, kinds or {}, default) | dict(extra or {})
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_family_gguf(path: Path, config: ModelConfig, weights: Mapping[str, np.ndarray], **changes: Any) -> None:
    """A GGUF file of one of the newer Mistrals as llama.cpp's converter writes it, in BF16.

    `changes` to the metadata, with the architecture left out of the keys.
    """
    scaling = config.rope_scaling
    architecture = "mistral3" if scaling else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if scaling:
        assert scaling.factor is not None
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(1.0)  # mscale_all_dim
        writer.add_attn_temperature_scale(scaling.query_beta)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        if config.layer_types:
            writer.add_sliding_window_pattern([window is not None for window in config.windows])
    for key, value in changes.items():
        # In the place of the one above.
        writer.kv_data[0][f"{architecture}.{key}"] = gguf.GGUFValue(value, gguf.GGUFValueType.get_type(value))
    for key, value in tokenizer_metadata().items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, array in weights.items():
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
        array = permuted(array, heads) if heads else array
        kind = Kind.F32 if array.ndim == 1 else Kind.BF16
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_mistral_gguf(
    path: Path,
    config: ModelConfig,
    kind: str = "F32",
    changes: Callable[[gguf.GGUFWriter], object] | None = None,
    version: str = "v1",
    **metadata: Any,
) -> dict[str, np.ndarray]:
    """A GGUF file of random weights with Mistral's tokenizer.

    Returns the weights as `kind` rounds them.
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    add_sentencepiece(writer, version)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), value, *value_type(value))
    if changes:
        changes(writer)
    expected = {}
    quant = gguf.GGMLQuantizationType[kind]
    for name, array in random_weights(config).items():
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
        stored = permuted(array, heads) if heads else array
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), stored)
            expected[name] = array
            continue
        data = gguf.quants.quantize(stored, quant)
        writer.add_tensor(gguf_name(name), data, raw_dtype=quant)
        rounded = gguf.quants.dequantize(data, quant).reshape(array.shape)
        inverse = permuted(np.arange(array.shape[0])[:, None], heads)[:, 0].argsort() if heads else slice(None)
        expected[name] = rounded[inverse]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def value_type(value: Any) -> tuple[Any, ...]:
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
    return (kinds[type(value)],)


def add_sentencepiece(writer: gguf.GGUFWriter, version: str) -> None:
    sp = SentencePieceProcessor(model_file=str(mistral_file(version)))
    size = range(sp.get_piece_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([sp.id_to_piece(i) for i in size])
    writer.add_token_scores([sp.get_score(i) for i in size])
    writer.add_token_types(
        [6 if sp.is_byte(i) else 3 if sp.is_control(i) else 2 if sp.is_unknown(i) else 5 if sp.is_unused(i) else 1
         for i in size]
    )  # fmt: skip
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def unpack_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a file with this metadata holds, written into `folder` and loaded."""
    for name, content in tokenizer_files(Path("m.gguf"), metadata).items():
        assert isinstance(content, bytes)
        (folder / name).write_bytes(content)
    return load_tokenizer(folder)
