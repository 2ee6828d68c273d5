"""Mistral's own params.json, as mistral-inference and vLLM read it (`configs/mistral.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from m7mlx.config_json import FULL, SLIDING
from m7mlx.config_keys import check_params_keys
from m7mlx.errors import ConfigError
from m7mlx.jsonfile import given, number, said, whole
from m7mlx.rope import RopeScaling, read_rope, yarn_factor


def read_params(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `ModelConfig`. Raises ConfigError."""
    if data.get("moe"):
        raise ConfigError("mixtures of experts are not supported; only dense Mistral is")
    check_params_keys(data)
    if beside := sorted((given(data, "multimodal", "an object") or {}).keys() - {"vision_encoder_args"}):
        raise ConfigError(f"multimodal has {beside[0][:100]!r}, which is not supported; pictures alone are left out")
    try:
        n_layers = whole(data["n_layers"], "n_layers")
        window, layer_types = _windows(data, n_layers)
        context = data.get("max_seq_len") or data.get("max_position_embeddings") or 32768
        theta = data.get("rope_theta")
        theta = (1e4 if window else 1e6) if theta is None else number(theta, "rope_theta")
        scaling = _scaling(data, whole(context, "max_position_embeddings"))
        scales_queries = scaling is not None and scaling.query_beta > 0
        return {
            "model_type": "ministral3" if scales_queries else "ministral" if layer_types else "mistral",
            "vocab_size": data["vocab_size"],
            "hidden_size": data["dim"],
            "intermediate_size": data["hidden_dim"],
            "n_layers": n_layers,
            "n_heads": data["n_heads"],
            "n_kv_heads": data.get("n_kv_heads", data["n_heads"]),
            "head_dim": data["head_dim"],
            "norm_eps": data["norm_eps"],
            "rope_theta": theta,
            "rope_scaling": scaling,
            "max_position_embeddings": context,
            "sliding_window": window,
            "layer_types": layer_types,
            "tie_word_embeddings": bool(data.get("tied_embeddings", False)),
        }
    except KeyError as error:
        raise ConfigError(f"{error.args[0]!r} is missing") from None


def _windows(data: Mapping[str, Any], n_layers: int) -> tuple[int | None, tuple[str, ...]]:
    """Return the window, and which layers have it where not all do.

    A list is that of the first layers, repeated for the rest; null in it stands for full attention.
    vLLM's files call it `_sliding_window`.
    """
    named = {key: data[key] for key in ("sliding_window", "_sliding_window") if data.get(key) is not None}
    if len(named) > 1:
        raise ConfigError("sliding_window and _sliding_window are both given; delete one of them")
    if not named:
        return None, ()
    [(key, window)] = named.items()
    if not isinstance(window, list):
        return whole(window, key), ()
    sizes = {whole(size, key) for size in window if size is not None}
    if len(sizes) > 1:
        raise ConfigError(f"{key} has windows of different sizes, which is not supported: {said(sorted(sizes))}")
    if not window or n_layers % len(window):
        raise ConfigError(f"{key} names {len(window)} layers, which does not divide the model's {n_layers}")
    if len(set(window)) == 1:
        return window[0], ()
    return sizes.pop(), tuple(FULL if size is None else SLIDING for size in window * (n_layers // len(window)))


def _scaling(data: Mapping[str, Any], context: int) -> RopeScaling | None:
    """Read `yarn` and `llama_4_scaling`; `rope_scaling` is Hugging Face's form of the first."""
    yarn, queries = given(data, "yarn", "an object"), given(data, "llama_4_scaling", "an object")
    _, scaling = read_rope({"rope_scaling": data.get("rope_scaling")}, context)
    if yarn:
        if scaling is not None:
            raise ConfigError("yarn and rope_scaling are both given; delete one of them")
        scaling = _read_yarn(yarn)
    if not queries:
        return scaling
    _check_part("llama_4_scaling", queries, ("beta", "original_max_position_embeddings"), ())
    original = whole(queries["original_max_position_embeddings"], "llama_4_scaling: original_max_position_embeddings")
    beta = number(queries["beta"], "llama_4_scaling: beta")
    scaling = scaling or RopeScaling(original)
    if scaling.original_context != original:
        raise ConfigError(
            f"llama_4_scaling and yarn name different original contexts, which is not supported: {original:,} and "
            f"{scaling.original_context:,}"
        )
    return replace(scaling, query_beta=float(beta))


def _read_yarn(yarn: Mapping[str, Any]) -> RopeScaling:
    _check_part("yarn", yarn, ("factor", "original_max_position_embeddings"), ("beta", "alpha", "apply_scale"))
    factor, fast, slow = (
        float(number(yarn.get(name, default), f"yarn: {name}"))
        for name, default in (("factor", None), ("beta", 32.0), ("alpha", 1.0))
    )
    applies = yarn.get("apply_scale", True)
    if not isinstance(applies, bool):
        raise ConfigError(f"yarn: apply_scale must be true or false, not {said(applies)}")
    return RopeScaling(
        whole(yarn["original_max_position_embeddings"], "yarn: original_max_position_embeddings"),
        factor=factor,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=yarn_factor(factor) if applies else 1.0,
    )


def _check_part(key: str, part: Mapping[str, Any], needed: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in needed:
        if name not in part:
            raise ConfigError(f"{key} needs {name}")
    if unknown := sorted(part.keys() - {*needed, *known}):
        raise ConfigError(f"{key} has {unknown[0][:100]!r}, which is not known here and could change the computation")
