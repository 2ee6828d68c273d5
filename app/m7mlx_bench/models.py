"""Models to measure: random ones of Mistral's shape, and copies that a peer can read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from m7mlx.arrays import dequantize, on_cpu
from m7mlx.config import ModelConfig
from m7mlx.errors import InputError
from m7mlx.files.weights import folder_weights
from m7mlx.memory import budget
from m7mlx.quantization import Quantization
from m7mlx.units import in_gigabytes
from m7mlx_bench.gguf_copy import write_gguf

Advance = Callable[[float], None]  # takes the share of a file or folder that is written


def _ignore(share: float) -> None:
    """Take a share of what is written where nobody looks."""


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


def write_random(folder: Path, config: ModelConfig, advance: Advance = _ignore) -> None:
    """Write random weights, in float32 or quantised as the config says, 1 GB a file.

    Raises InputError where the disk has no room for them.
    """
    scheme = config.quantization
    bits = scheme.bits + 32 / scheme.group_size if scheme else 32
    _check_room(folder.parent, config.n_weights * bits / 8)
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

    done = 0
    for name, shape in config.weight_shapes().items():
        arrays |= _random(name, shape, config.quantization)
        done += math.prod(shape)
        advance(done / config.n_weights)
        if sum(array.nbytes for array in arrays.values()) > _FILE_BYTES:
            save()
    save()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _check_room(place: Path, nbytes: float) -> None:
    """Raise InputError where the disk has no room for so many bytes of weights."""
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise InputError(
            f"{in_gigabytes(nbytes)} of weights are to be written, and {place.parent} has room for "
            f"{in_gigabytes(free)}; name a folder with more in TMPDIR"
        )


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


def find_readable(
    engine: str,
    folder: Path,
    scratch: Path,
    advance: Advance = _ignore,
) -> tuple[Path, str]:
    """Return what an engine is to read, and a note on it.

    That is a copy where it cannot or should not read this folder. Raises InputError for a model
    that it cannot read at all.
    """
    config = ModelConfig.from_folder(folder)
    if engine == "mlx-lm rotating" and config.sliding_window is None:
        raise InputError("the model has no window")
    if engine == "mlx-lm rotating" and config.layer_types:
        raise InputError("a part of the model's layers has no window")
    if engine.startswith("transformers") and config.quantization:
        if config.n_weights * 4 > budget() // 2:
            raise InputError("its weights in float32 take more than half of this machine's memory")
        note = "reads the same weights expanded to float32"
        return _copy(folder, scratch / "float32", True, advance), note
    if engine.startswith("mlx-lm") and config.quantization and on_cpu():
        note = "reads the same codes with float32 scales: 16-bit arithmetic is emulated on this backend"
        return _copy(folder, scratch / "wide", False, advance), note
    return folder, ""


def find_gguf(
    given: Path | None,
    folder: Path,
    scratch: Path,
    advance: Advance = _ignore,
) -> tuple[Path, str]:
    """Return the GGUF file that llama.cpp is to read, and a note: the one given, or a copy.

    Raises InputError where no type of GGUF holds the folder's numbers, or no memory or disk a copy.
    """
    rounds = "it rounds the inputs of products to 8 bits, and keys and values to 16"
    if given:
        return given, f"reads {given.name}; {rounds}"
    config = ModelConfig.from_folder(folder)
    if config.layer_types or config.rope_scaling:
        raise InputError(
            "a copy would lack its windows by layer, its YaRN or its scaled queries; give one: --gguf FILE"
        )
    stored = _stored_bytes(folder)
    if stored > budget():
        raise InputError(f"its copy would take {in_gigabytes(stored)}, more than this machine's memory")
    _check_room(scratch, stored * 1.2)  # Q4_1 has 5 bits a weight, MLX 4.25 at the least
    file = scratch / "model.gguf"
    kinds = write_gguf(folder, file, advance)
    weights = config.n_weights
    theirs = 8 * file.stat().st_size / weights
    ours = 8 * sum(stored.stat().st_size for stored in folder.glob("*.safetensors")) / weights
    return (
        file,
        f"reads the same numbers as {kinds}, {theirs:.2f} bits a weight (the folder has {ours:.2f}); {rounds}",
    )


def _stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _copy(folder: Path, target: Path, expand: bool, advance: Advance) -> Path:
    """Copy a folder with its floats in float32, and with `expand` the quantised numbers too."""
    if target.exists():
        return target
    config = ModelConfig.from_folder(folder)
    _check_room(target.parent, config.n_weights * 4 if expand else 1.2 * _stored_bytes(folder))
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*", "SHA256SUMS"))
    files = sorted({stored.path for stored in folder_weights(folder).values()})
    names: dict[str, str] = {}
    for number, file in enumerate(files):
        advance(number / len(files))
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
