"""Mistral's own layout: params.json and consolidated.safetensors.

It holds the numbers of Hugging Face's layout under other names. Query and key rows are stored for
interleaved RoPE and are put back into the rotate-half order (transformers,
`convert_mistral_weights_to_hf.py`, `permute_for_rope`). What sees pictures is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from m7mlx.config import ModelConfig
from m7mlx.errors import WeightsError
from m7mlx.files.weights import DTYPES, FLOATS, FP8, StoredTensor, check_layer_count
from m7mlx.terminal import shown
from m7mlx.text_tower import is_vision
from m7mlx_convert.float8 import Blocks, is_scale, open_float8
from m7mlx_convert.source import Arrays, Tensor, make_reader

NAMES = {  # name on disk → name in the file
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def is_native(folder: Path, headers: Mapping[str, StoredTensor] | None = None) -> bool:
    """Return whether the weights are in Mistral's layout alone; Hugging Face's has precedence."""
    files = [s.path for s in headers.values()] if headers is not None else [*folder.glob("*.safetensors")]
    return bool(files) and all(file.name.startswith("consolidated") for file in files)


def list_tensors(
    folder: Path,
    config: ModelConfig,
    headers: Mapping[str, StoredTensor],
    named: mx.Dtype,
) -> dict[str, Tensor]:
    """Return the parameters by name. Raises WeightsError where files and config differ.

    named  the type that FP8 weights expand to
    """
    check_layer_count(folder, config, len(headers), "its configuration")
    found = {}
    names = {name: native_name(name) for name in config.weight_shapes()}
    tied = {f"{NAMES['lm_head']}.weight"} if config.tie_word_embeddings else set()
    extra = sorted(headers.keys() - set(names.values()) - tied)
    if extra := [name for name in extra if not (is_vision(name) or is_scale(name))]:
        raise WeightsError(f"{folder}: tensor {shown(extra[0])} is not a part of a plain Mistral model")
    for name, shape in config.weight_shapes().items():
        stored = headers.get(names[name])
        if stored is None:
            raise WeightsError(f"{folder}: tensor {names[name]} is missing")
        if stored.dtype == FP8:
            tensor = open_float8(folder, names[name], shape, headers, Blocks(), named)
        elif stored.shape == shape and stored.dtype in FLOATS:
            tensor = Tensor(shape, DTYPES[stored.dtype], make_reader(headers, {"weight": names[name]}))
        else:
            raise WeightsError(
                f"{folder}: {names[name]} is {stored.dtype} {list(stored.shape)}, its config says {list(shape)}"
            )
        order = row_order(config, name)
        found[name] = tensor if order is None else replace(tensor, read=_ordered(tensor.read, order))
    return found


def native_name(name: str, names: Mapping[str, str] = NAMES, layers: str = "layers") -> str:
    """Return what the files of another layout call the parameter `name`.

    names   our modules → theirs
    layers  what they call the list of layers
    """
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return names[module] + ".weight"
    _, _, layer, part = module.split(".", 3)
    return f"{layers}.{layer}.{names[part]}.weight"


def row_order(config: ModelConfig, name: str) -> np.ndarray | None:
    """Return which stored row is row i of a query or key projection; None for other parameters."""
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    pairs = np.arange(heads * config.head_dim).reshape(heads, config.head_dim // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def _ordered(read: Callable[[], Arrays], order: np.ndarray) -> Callable[[], Arrays]:
    return lambda: {"weight": read()["weight"][mx.array(order)]}
