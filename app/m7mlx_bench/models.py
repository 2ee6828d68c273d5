"""Models to measure: random ones of Mistral's shape, and copies that a peer can read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from m7mlx.arrays import dequantize, on_cpu
from m7mlx.config import ModelConfig
from m7mlx.errors import InputError
from m7mlx.files.weights import folder_weights
from m7mlx.memory import budget
from m7mlx.quantization import Quantization

SMALL = ModelConfig(
    model_type="mistral",
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1792,
    n_layers=4,
    n_heads=8,
    n_kv_heads=2,
    head_dim=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=1 << 18,
    sliding_window=1024,
    tie_word_embeddings=False,
)
SHAPES = {
    "small": SMALL,
    "135m": replace(
        SMALL,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        tie_word_embeddings=True,
    ),
    "7b": replace(
        SMALL,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        sliding_window=4096,
    ),
}
_FILE_BYTES = 1 << 30


def write_random(folder: Path, config: ModelConfig) -> None:
    """Write random weights, in float32 or quantised as the config says, 1 GB a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    mx.random.seed(0)
    arrays: dict[str, mx.array] = {}
    names: dict[str, str] = {}

    def save() -> None:
        file = f"model-{len(set(names.values())) + 1:05d}.safetensors"
        mx.save_safetensors(str(folder / file), arrays, {"format": "mlx"})
        names.update(dict.fromkeys(arrays, file))
        arrays.clear()
        mx.clear_cache()

    for name, shape in config.weight_shapes().items():
        arrays |= _random(name, shape, config.quantization)
        if sum(array.nbytes for array in arrays.values()) > _FILE_BYTES:
            save()
    save()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _random(name: str, shape: tuple[int, ...], scheme: Quantization | None) -> dict[str, mx.array]:
    if len(shape) == 1:
        return {name: mx.ones(shape)}
    if scheme is None:
        weight = mx.random.normal(shape) * 0.02
        mx.eval(weight)
        return {name: weight}
    rows, columns = shape
    if columns % scheme.group_size:
        raise InputError(f"groups of {scheme.group_size} do not divide {name}'s rows of {columns}")
    words = mx.random.randint(0, 1 << 32, (rows, columns * scheme.bits // 32), mx.uint32)
    scales = mx.full((rows, columns // scheme.group_size), 0.08 / (1 << scheme.bits), mx.float16)
    biases = scales * -((1 << scheme.bits) / 2)
    mx.eval(words, scales, biases)
    path = name.removesuffix("weight")
    return {name: words, f"{path}scales": scales, f"{path}biases": biases}


def find_readable(engine: str, folder: Path, scratch: Path) -> tuple[Path, str]:
    """Return the folder that an engine is to read, and a note on it.

    That is a copy where it cannot or should not read this one. Raises InputError for a model that
    it cannot read at all.
    """
    config = ModelConfig.from_folder(folder)
    if engine == "mlx-lm rotating" and config.sliding_window is None:
        raise InputError("the model has no window")
    if engine.startswith("transformers") and config.quantization:
        if config.n_weights * 4 > budget() // 2:
            raise InputError("its weights in float32 take more than half of this machine's memory")
        return _copy(folder, scratch / "float32", expand=True), "reads the same weights expanded to float32"
    if engine.startswith("mlx-lm") and config.quantization and on_cpu():
        note = "reads the same codes with float32 scales: 16-bit arithmetic is emulated on this backend"
        return _copy(folder, scratch / "wide", expand=False), note
    return folder, ""


def _copy(folder: Path, target: Path, expand: bool) -> Path:
    """Copy a folder with its floats in float32, and with `expand` the quantised numbers too."""
    if target.exists():
        return target
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*", "SHA256SUMS"))
    config = ModelConfig.from_folder(folder)
    files = sorted({stored.path for stored in folder_weights(folder).values()})
    names: dict[str, str] = {}
    for file in files:
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        made = _expanded(arrays, config) if expand else {name: _wide(array) for name, array in arrays.items()}
        mx.save_safetensors(str(target / file.name), made, {"format": "pt" if expand else "mlx"})
        names |= dict.fromkeys(made, file.name)
        del arrays, made
        mx.clear_cache()
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    if expand:
        data = json.loads((folder / "config.json").read_text())
        data = {k: v for k, v in data.items() if not k.startswith("quantization")} | {"torch_dtype": "float32"}
        (target / "config.json").write_text(json.dumps(data))
    return target


def _wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _expanded(arrays: Mapping[str, mx.array], config: ModelConfig) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for name, array in arrays.items():
        path, kind = name.rsplit(".", 1)
        if kind in ("scales", "biases"):
            continue
        scheme = config.quantization.for_module(path) if config.quantization else None
        parts = {k: arrays[f"{path}.{k}"] for k in ("weight", "scales", "biases") if f"{path}.{k}" in arrays}
        found[name] = dequantize(parts, scheme) if scheme and "scales" in parts else _wide(array)
    return found
