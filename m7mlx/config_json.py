"""Hugging Face's config.json, with Hugging Face's defaults for what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m7mlx.config_keys import check_keys, check_wrapper_keys
from m7mlx.errors import ConfigError
from m7mlx.jsonfile import given, said, texts, token_ids, whole
from m7mlx.quantization import Quantization
from m7mlx.rope import read_rope

# Hugging Face's defaults, from the config class of each; those that they share are in _SHARED.
_SHARED: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_MISTRAL = _SHARED | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": _MISTRAL,
    "llama": _SHARED
    | {
        "intermediate_size": 11008,
        "num_key_value_heads": None,  # as many as query heads
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
    "ministral": _MISTRAL,
    "ministral3": _MISTRAL
    | {
        "vocab_size": 131072,
        "num_hidden_layers": 34,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "sliding_window": None,
    },
}
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "attention_factor": 1.0,
    "llama_4_scaling_beta": 0.1,
}
ARCHITECTURES = {
    "MistralForCausalLM": "mistral",
    "LlamaForCausalLM": "llama",
    "MinistralForCausalLM": "ministral",
    "Ministral3ForCausalLM": "ministral3",
    "Mistral3ForConditionalGeneration": "mistral3",
}
_WRAPPER = "mistral3"  # its `text_config` is one of the others; what sees pictures is left out
_WRAPPED = "language_model."  # where a wrapper has the text's modules
MOST_LAYERS = 10_000
FULL, SLIDING = "full_attention", "sliding_attention"


def read_config(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `ModelConfig`. Raises ConfigError.

    Of a model that sees pictures, the part that reads and writes text is read.
    """
    if (model_type := _model_type(data)) == _WRAPPER:
        return read_config(_unwrapped(data))
    values = _DEFAULTS[model_type] | {k: v for k, v in data.items() if v is not None or k == "sliding_window"}
    if model_type == "llama" and values["sliding_window"] is not None:
        raise ConfigError("sliding_window is not a part of llama; say model_type mistral if it is meant")
    check_keys(data)
    n_heads, hidden = values["num_attention_heads"], values["hidden_size"]
    head_dim = values.get("head_dim")
    if head_dim is None:
        if whole(hidden, "hidden_size") % whole(n_heads, "num_attention_heads"):
            raise ConfigError(f"hidden_size {hidden} is no multiple of {n_heads} heads, and head_dim is absent")
        head_dim = hidden // n_heads
    quantization = given(data, "quantization", "an object")
    foreign = given(data, "quantization_config", "an object")
    if quantization is None and foreign is not None:
        method = said(foreign.get("quant_method", "unknown"))
        raise ConfigError(f"weights quantised by {method} are not MLX's; convert them: m7mlx-convert FOLDER")
    is_3 = model_type == "ministral3"
    context = whole(values["max_position_embeddings"], "max_position_embeddings")
    theta, scaling = read_rope(data, context, default=_MINISTRAL3_ROPE if is_3 else None, scales_queries=is_3)
    n_layers = whole(values["num_hidden_layers"], "num_hidden_layers", MOST_LAYERS)
    window, layer_types = _layers(texts(data, "layer_types"), n_layers, values["sliding_window"])
    return {
        "model_type": model_type,
        "vocab_size": values["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": values["intermediate_size"],
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_heads if values["num_key_value_heads"] is None else values["num_key_value_heads"],
        "head_dim": head_dim,
        "norm_eps": values["rms_norm_eps"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": context,
        "sliding_window": window,
        "layer_types": layer_types,
        "tie_word_embeddings": _boolean(values, "tie_word_embeddings"),
        "bos_token_id": data.get("bos_token_id", 1),
        "eos_token_ids": token_ids(data.get("eos_token_id", 2), "eos_token_id"),
        "quantization": Quantization.from_dict(quantization) if quantization else None,
    }


def check_layer_types(kinds: Sequence[str], n_layers: int, window: int | None) -> None:
    """Raise ConfigError for types that are not known, or contradict what else the config says."""
    if unknown := sorted(set(kinds) - {FULL, SLIDING}):
        raise ConfigError(f"layer_types has {said(unknown[0])}, which is not supported; {FULL} and {SLIDING} are")
    if kinds and len(kinds) != n_layers:
        raise ConfigError(f"layer_types names {len(kinds)} layers, but num_hidden_layers is {n_layers}")
    if SLIDING in kinds and window is None:
        raise ConfigError(f"layer_types has {SLIDING}, but sliding_window is null")


def _model_type(data: Mapping[str, Any]) -> str:
    """Return the architecture; one that is not supported is refused by name."""
    named = texts(data, "architectures")
    model_type = given(data, "model_type", "a text") or (ARCHITECTURES.get(named[0]) if named else None)
    foreign = [name for name in named if name not in ARCHITECTURES]
    if foreign or model_type not in ARCHITECTURES.values():
        found = foreign[0] if foreign else (model_type or "no architecture")
        raise ConfigError(
            f"architecture {said(found)[1:-1]} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    if named and ARCHITECTURES[named[0]] != model_type:
        raise ConfigError(f"architectures says {named[0]} but model_type says {model_type}")
    return str(model_type)


def _unwrapped(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the text's part of a model that sees pictures, by itself."""
    check_wrapper_keys(data)
    text = given(data, "text_config", "an object")
    if text is None:
        raise ConfigError(f"{_WRAPPER} needs text_config")
    text = dict(text) | {"model_type": text.get("model_type") or "mistral"}
    if text["model_type"] in (_WRAPPER, "llama"):
        raise ConfigError(f"text_config: model_type {text['model_type']} is not supported in {_WRAPPER}")
    for key in ("bos_token_id", "eos_token_id"):
        if data.get(key) is not None:
            text.setdefault(key, data[key])
    # In transformers the wrapper decides, and ties where nothing is said; mlx-lm asks the text.
    tied = data.get("tie_word_embeddings")
    text["tie_word_embeddings"] = text.get("tie_word_embeddings", True) if tied is None else tied
    for key in ("quantization", "quantization_config"):
        if found := given(data, key, "an object"):
            text[key] = {name.removeprefix(_WRAPPED): value for name, value in found.items()}
    return text


def _layers(kinds: list[str], n_layers: int, window: int | None) -> tuple[int | None, tuple[str, ...]]:
    """Return the window, and the layers' types where they differ."""
    check_layer_types(kinds, n_layers, window)
    if len(set(kinds)) == 2:
        return window, tuple(kinds)
    return (None if FULL in kinds else window), ()


def _boolean(values: Mapping[str, Any], key: str) -> bool:
    if not isinstance(values[key], bool):
        raise ConfigError(f"{key} must be true or false, not {said(values[key])}")
    return bool(values[key])
