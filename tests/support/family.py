"""The newer Mistrals, small and random, in the forms in which they are published."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from models import random_weights
from sources import little, native_params, native_weights, tokenizer_json

from m7mlx.config import ModelConfig
from m7mlx.rope import RopeScaling

# A tensor as a file holds it: safetensors' name of its type, its shape, its bytes.
Stored = tuple[str, tuple[int, ...], bytes]
SCALED = RopeScaling(32, factor=4.0, query_beta=0.25)


def ministral3(**changes: Any) -> ModelConfig:
    """Ministral 3: YaRN and scaled queries, from 32 positions to 128."""
    sizes = {"model_type": "ministral3", "sliding_window": None, "rope_theta": 1e6, "rope_scaling": SCALED}
    return little(**sizes | {"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_ids": (1,)} | changes)


def ministral(**changes: Any) -> ModelConfig:
    """Ministral 8B: full attention in the first of two layers, a window of 7 in the second."""
    layers = ("full_attention", "sliding_attention")
    ids = {"bos_token_id": 0, "eos_token_ids": (1,)}
    return little(**{"model_type": "ministral", "layer_types": layers} | ids | changes)


def mistral(**changes: Any) -> ModelConfig:
    """Small 3: no window."""
    return little(**{"sliding_window": None, "bos_token_id": 0, "eos_token_ids": (1,)} | changes)


FAMILY = {"mistral": mistral, "ministral": ministral, "ministral3": ministral3}


def rounded(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random weights that bfloat16 holds without loss, in float32."""
    weights = {n: mx.array(a).astype(mx.bfloat16).astype(mx.float32) for n, a in random_weights(config).items()}
    return {name: np.array(array) for name, array in weights.items()}


# --- safetensors by hand, for types that MLX does not write ---------------------------------------


def as_stored(array: np.ndarray) -> Stored:
    """Floats as BF16 holds them."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16
    return "BF16", array.shape, bits.astype(np.uint16).tobytes()


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    header, data = {}, b""
    for name, (dtype, shape, numbers) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def decode_fp8(codes: np.ndarray) -> np.ndarray:
    """Numbers of float8_e4m3fn by definition: sign, four bits of exponent, three of fraction."""
    codes = codes.astype(np.int64)
    sign, exponent, fraction = 1 - 2 * (codes >> 7), codes >> 3 & 15, codes & 7
    small = np.ldexp(fraction / 8, -6)
    numbers = np.where(exponent == 0, small, np.ldexp(1 + fraction / 8, exponent - 7))
    return np.where(codes & 127 == 127, np.nan, sign * numbers).astype(np.float32)


# --- folders --------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_family(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Stored] | None = None,
    **changes: Any,
) -> Path:
    """A folder of Hugging Face's layout in bfloat16.

    `tensors` in the place of the random ones, `changes` to its config.json.
    """
    folder.mkdir(parents=True)
    whole = tensors or {name: as_stored(array) for name, array in rounded(config).items()}
    write_safetensors(folder / "model.safetensors", whole)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": "bfloat16"} | changes))
    write_tokenizer(folder)
    return folder


def wrapped_name(name: str, is_new: bool) -> str:
    """What Mistral3ForConditionalGeneration calls a tensor of its text tower."""
    if is_new:  # transformers 5
        return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
    return f"language_model.{name}"


def vision(is_new: bool) -> dict[str, Stored]:
    """Tensors of a vision tower and of what joins it to the text."""
    prefix = "model." if is_new else ""
    names = ("vision_tower.patch_conv.weight", "multi_modal_projector.linear_1.weight")
    return {prefix + name: as_stored(np.ones((4, 4))) for name in names}


def write_wrapped(
    folder: Path,
    config: ModelConfig,
    *,
    is_new: bool = False,
    tensors: Mapping[str, Stored] | None = None,
    **changes: Any,
) -> Path:
    """A folder of Mistral3ForConditionalGeneration, whose text tower is the model of `config`."""
    whole = tensors or {name: as_stored(array) for name, array in rounded(config).items()}
    text = config.to_dict()
    del text["architectures"]
    data = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text,
        "vision_config": {"model_type": "pixtral"},
        "image_token_index": 10,
        "dtype": "bfloat16",
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    write_family(folder, config, {wrapped_name(n, is_new): t for n, t in whole.items()} | vision(is_new))
    (folder / "config.json").write_text(json.dumps(data | changes))
    return folder


def params_of(config: ModelConfig) -> dict[str, Any]:
    """The params.json of a model in Mistral's own layout."""
    params = native_params(config) | {
        "max_position_embeddings": config.max_position_embeddings,
        "tied_embeddings": config.tie_word_embeddings,
    }
    if config.layer_types:
        params["sliding_window"] = list(config.windows)
    elif config.sliding_window:
        params["sliding_window"] = config.sliding_window
    if scaling := config.rope_scaling:
        original = {"original_max_position_embeddings": scaling.original_context}
        yarn = {"factor": scaling.factor, "beta": scaling.beta_fast, "alpha": scaling.beta_slow, "apply_scale": False}
        params["yarn"] = original | yarn
        params["llama_4_scaling"] = original | {"beta": scaling.query_beta}
    return params


def write_own_layout(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Stored] | None = None,
    **changes: Any,
) -> Path:
    """A folder of Mistral's own layout; `changes` go into its params.json."""
    folder.mkdir()
    if tensors is None:
        weights = native_weights(config, rounded(config))
        tensors = {name: as_stored(np.array(array)) for name, array in weights.items()}
    write_safetensors(folder / "consolidated.safetensors", tensors)
    (folder / "params.json").write_text(json.dumps(params_of(config) | changes))
    write_tokenizer(folder)
    return folder
