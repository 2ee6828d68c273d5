"""The shape of a model, read from the metadata of a GGUF file.

llama.cpp knows Mistral's models as "llama", and those with scaled queries as "mistral3". A key that
would change the computation and is not understood is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, WeightsError
from m7mlx.files.weights import check_layer_count
from m7mlx.jsonfile import number, whole
from m7mlx.rope import RopeScaling, yarn_factor
from m7mlx.terminal import shown

if TYPE_CHECKING:
    from pathlib import Path

_ARCHITECTURES = ("llama", "mistral3")
_UNDERSTOOD = {  # what follows the architecture in a key
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
    "attention.sliding_window_pattern",
    "attention.temperature_length",
    "attention.temperature_scale",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
    "expert_used_count",  # says nothing while there are no experts
    "tensor_data_layout",  # the interleaved one
}
# Keys → values that change nothing, and what other values mean.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "expert_count": ((0,), "mixtures of experts are"),
    "rope.scale_linear": ((1.0,), "scaled RoPE is"),
    "rope.scaling.yarn_ext_factor": ((1.0,), "YaRN in part is"),
    "attention.causal": ((True,), "attention to later tokens is"),
    "use_parallel_residual": ((False,), "parallel residuals are"),
}


def read_config(
    path: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the configuration, and notes on it. Raises ConfigError, WeightsError.

    shapes  of the tensors in the file, by name
    """
    architecture, values = _architecture_values(path, metadata)
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise WeightsError(f"{path}: tensor token_embd.weight is missing or no matrix")
    vocab_size = embedding[0]
    try:
        heads, hidden = values["attention.head_count"], values["embedding_length"]
        scaling = _rope_scaling(architecture, values)
        config = ModelConfig(
            model_type="ministral3" if scaling and scaling.query_beta else "llama",
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=values["feed_forward_length"],
            n_layers=values["block_count"],
            n_heads=heads,
            n_kv_heads=values.get("attention.head_count_kv", heads),
            head_dim=values.get("attention.key_length") or values.get("rope.dimension_count") or hidden // heads,
            norm_eps=_decimal(values["attention.layer_norm_rms_epsilon"]),
            rope_theta=_decimal(values.get("rope.freq_base", 10000.0)),
            rope_scaling=scaling,
            max_position_embeddings=values["context_length"],
            sliding_window=None,
            tie_word_embeddings="output.weight" not in shapes,
            bos_token_id=next(iter(_ids(path, metadata, vocab_size, "bos")), None),
            eos_token_ids=_ids(path, metadata, vocab_size, "eos", "eot"),
        )
        config, notes = _with_window(config, values)
    except KeyError as error:
        raise ConfigError(f"{path}: {architecture}.{error.args[0]} is missing from its metadata") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: its metadata cannot be understood ({error})") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if values.get("rope.dimension_count", config.head_dim) != config.head_dim:
        raise ConfigError(f"{path}: RoPE over a part of the head is not supported")
    if values.get("attention.value_length", config.head_dim) != config.head_dim:
        raise ConfigError(f"{path}: keys and values of different lengths are not supported")
    check_layer_count(path, config, len(shapes), "its metadata")
    return config, notes


def _architecture_values(path: Path, metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the architecture, and the values under its name.

    Raises ConfigError for an architecture or a key that is not understood.
    """
    name = metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise ConfigError(
            f"{path}: architecture {shown(name)!r} is not supported; supported is llama (Mistral included), mistral3"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise ConfigError(f"{path} is one of several parts; join them with: llama-gguf-split --merge")
    values = {k.removeprefix(f"{name}."): v for k, v in metadata.items() if k.startswith(f"{name}.")}
    for key, value in values.items():
        neutral, meaning = _NEUTRAL.get(key, ((), "this kind of model is"))
        if key not in _UNDERSTOOD and value not in neutral:
            raise ConfigError(f"{path}: {meaning} not supported ({shown(f'{name}.{key} = {value}')})")
    return str(name), values


def _rope_scaling(architecture: str, values: Mapping[str, Any]) -> RopeScaling | None:
    """Return what is done to see further than the first training.

    Where a file names a factor and no type, llama.cpp divides positions by it. Its factor of
    attention follows from the others, with the 1 of `mscale` and yarn_log_multiplier as the other
    (llama-context.cpp).

    Raises ConfigError for scalings that are not supported.
    """
    factor = values.get("rope.scaling.factor") or 1.0
    kind = values.get("rope.scaling.type", "none" if factor == 1 else "linear")
    if kind not in ("none", "yarn") or (kind == "yarn" and "rope.scaling.factor" not in values):
        raise ConfigError(f"scaled RoPE is not supported ({shown(f'{architecture}.rope.scaling.type = {kind}')})")
    original = values.get("rope.scaling.original_context_length") or values["context_length"]
    beta = _decimal(values.get("attention.temperature_scale", 0.0))
    if beta:
        number(beta, "attention.temperature_scale")
    if beta or kind == "yarn":
        whole(original, "rope.scaling.original_context_length")
    if beta and values.get("attention.temperature_length", original) != original:
        raise ConfigError("attention.temperature_length that is not the original context is not supported")
    scaling = RopeScaling(original, query_beta=beta) if beta else None
    if kind == "none":
        return scaling
    factor = _number(values, "factor", 1.0)
    grown = _number(values, "yarn_log_multiplier", 0.0) if values.get("rope.scaling.yarn_log_multiplier") else None
    attention = yarn_factor(factor, 1.0, grown)
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if abs(values.get(key, attention) - attention) > 1e-6:
            raise ConfigError(f"{key} = {values[key]} contradicts the other numbers of YaRN, which make {attention}")
    return RopeScaling(
        original,
        factor=factor,
        beta_fast=_number(values, "yarn_beta_fast", 32.0),
        beta_slow=_number(values, "yarn_beta_slow", 1.0),
        attention_factor=attention,
        query_beta=beta,
    )


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    """Return a number of the scaling, or llama.cpp's default; raises ConfigError unless above 0."""
    key = f"rope.scaling.{name}"
    return float(number(_decimal(values.get(key, default)), key))


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
    """Add the sliding window, which llama.cpp's converter leaves out of what it calls llama.

    Mistral 7B v0.1 and its fine-tunes are known by their shape and RoPE base: from v0.2 on, which
    has no window, the base is 1,000,000.
    """
    if window := values.get("attention.sliding_window"):
        return _windowed(config, window, values.get("attention.sliding_window_pattern")), ()
    shape = (config.hidden_size, config.intermediate_size, config.n_layers, config.n_heads, config.n_kv_heads)
    if shape == (4096, 14336, 32, 32, 8) and config.rope_theta == 10000.0 and config.rope_scaling is None:
        note = "this is Mistral 7B v0.1 by its shape: its sliding window of 4,096, which GGUF leaves out, is set"
        return replace(config, model_type="mistral", sliding_window=4096), (note,)
    return config, ()


def _windowed(config: ModelConfig, window: Any, slides: Any) -> ModelConfig:
    """Return the configuration with a window.

    slides  whether each layer has it, in order; None for all
    """
    layers = [True] * config.n_layers if slides is None else slides
    if not isinstance(layers, list) or len(layers) != config.n_layers or {type(s) for s in layers} != {bool}:
        raise ConfigError(
            f"attention.sliding_window_pattern must say true or false of each layer, not {shown(slides)}"
        )
    if not any(layers):
        return config
    types = () if all(layers) else tuple("sliding_attention" if s else "full_attention" for s in layers)
    kind = "ministral3" if config.model_type == "ministral3" else "ministral" if types else "mistral"
    return replace(config, model_type=kind, sliding_window=window, layer_types=types)
