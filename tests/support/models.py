"""Small models, their folders, and the real Mistral tokenizers' files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from m7mlx.arrays import dequantize
from m7mlx.config import ModelConfig
from m7mlx.loading import build
from m7mlx.model import Mistral

MISTRAL_FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
}


def small_config(**changes: Any) -> ModelConfig:
    """Return the configuration of a Mistral of a few thousand parameters.

    The window is much shorter than the tests' sequences.
    """
    values: dict[str, Any] = {
        "model_type": "mistral",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 4096,
        "sliding_window": 7,
        "tie_word_embeddings": False,
    }
    return ModelConfig(**values | changes)


def mixed_config(**changes: Any) -> ModelConfig:
    """Return the same with one layer of full attention beside two with the window."""
    values: dict[str, Any] = {"layer_types": ("full_attention", "sliding_attention", "sliding_attention")}
    return small_config(**(values | {"model_type": "ministral"} | changes))


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights large enough that every part of the model shows in the logits."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in config.weight_shapes().items():
        scale = 1.0 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1])
        weights[name] = (rng.standard_normal(shape) * scale + (len(shape) == 1)).astype(np.float32)
    return weights


def small_model(config: ModelConfig, seed: int = 0) -> Mistral:
    return build(config, {name: mx.array(array) for name, array in random_weights(config, seed).items()})


def named_arrays(module: nn.Module) -> dict[str, mx.array]:
    """The parameters of a module by their names, joined by dots."""
    return dict(tree_flatten(module.parameters()))


def weights_on_disk(model: Mistral) -> dict[str, np.ndarray]:
    """The weights of a loaded model in float32 by their names on disk: `m7mlx.fuse` undone."""
    arrays = named_arrays(model)
    loaded = {}
    for name in (name for name in arrays if name.endswith(".weight")):
        path = name.removesuffix(".weight")
        scheme = model.config.quantization.for_module(path) if model.config.quantization else None
        kinds = [kind for kind in ("weight", "scales", "biases") if f"{path}.{kind}" in arrays]
        parts = {kind: arrays[f"{path}.{kind}"] for kind in kinds}
        loaded[name] = np.array(
            dequantize(parts, scheme) if scheme and "scales" in parts else arrays[name].astype(mx.float32)
        )
    found: dict[str, np.ndarray] = {}
    taken: dict[str, int] = {}
    for name, shape in model.config.weight_shapes().items():
        fused = re.sub("[qkv]_proj", "qkv_proj", re.sub("(gate|up)_proj", "gate_up_proj", name))
        fused = fused if fused in loaded else name
        start = taken.get(fused, 0)
        taken[fused] = start + shape[0]
        found[name] = loaded[fused][start : taken[fused]]
    assert taken == {name: array.shape[0] for name, array in loaded.items()}
    return found


def write_folder(folder: Path, config: ModelConfig, weights: dict[str, np.ndarray] | None = None) -> Path:
    """Write a whole model folder: config, weights and tokenizer.

    The tokenizer is v1 or v3, whichever the vocabulary fits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    arrays = {name: mx.array(array) for name, array in (weights or random_weights(config)).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    version = "v3" if config.vocab_size >= 32768 else "v1"
    shutil.copy(mistral_file(version), folder / "tokenizer.model")
    return folder


def shard(folder: Path) -> None:
    """Rewrite the folder's weights as two shards and an index."""
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        mx.save_safetensors(str(folder / file), {n: weights[n] for n in part})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {n: file for file, part in halves.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def mistral_file(version: str) -> Path:
    return Path(mistral_common.__file__).parent / "data" / MISTRAL_FILES[version]
