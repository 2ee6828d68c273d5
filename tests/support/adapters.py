"""LoRA adapters, as mlx-lm and PEFT write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from sources import quantisable

ADAPTED = quantisable()  # the model that these adapters are for
RANK = 4
QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1)


def write_mlx_lm(folder: Path, kind: str, modules: list[str]) -> None:
    """An adapter as mlx-lm's trainer writes it."""
    folder.mkdir()
    keys = [module.rpartition("layers.1.")[2] for module in modules]
    parameters = {"rank": RANK, "scale": 3.0, "dropout": 0.1, "keys": keys}
    settings = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    arrays = {}
    for module in modules:
        rows, columns = ADAPTED.weight_shapes()[f"{module}.weight"]
        if kind == "full":
            arrays[f"{module}.weight"] = random(rows, columns, seed=3)
            continue
        outer, inner = (rows, columns) if module == EMBEDDING else (columns, rows)
        arrays[f"{module}.lora_a"] = random(outer, RANK)
        arrays[f"{module}.lora_b"] = random(RANK, inner, seed=1)
        if kind == "dora":
            arrays[f"{module}.m"] = mx.abs(random(rows, seed=2)) + 1
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)


def write_peft(folder: Path, modules: list[str], extra: dict[str, mx.array] | None = None, **settings: Any) -> None:
    """An adapter as PEFT saves it; `extra` tensors and `settings` besides."""
    folder.mkdir()
    arrays = dict(extra or {})
    for module in modules:
        rows, columns = ADAPTED.weight_shapes()[f"{module}.weight"]
        arrays[f"base_model.model.{module}.lora_A.weight"] = random(RANK, columns)
        arrays[f"base_model.model.{module}.lora_B.weight"] = random(rows, RANK, seed=1)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "use_rslora": False, "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))


def break_config(folder: Path, **settings: Any) -> None:
    """Change settings of a PEFT adapter that was written."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
