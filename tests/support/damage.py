"""What can be wrong with a model folder, and how it is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from models import mistral_file, random_weights, shard, small_config, write_folder

from m7mlx.errors import ConfigError, M7Error, TokenizerError, WeightsError

CONFIG = small_config(vocab_size=32000, n_layers=1)  # of the folder that is damaged


def edit_config(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | changes))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = random_weights(CONFIG)
    change(weights)
    write_folder(folder, CONFIG, weights)


def drop_shard(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()


def add_stray(folder: Path) -> None:
    shard(folder)
    shutil.copy(folder / "a.safetensors", folder / "stray.safetensors")


def move_tensor(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "b.safetensors"
    index["weight_map"]["lm_head.weight"] = "b.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def hostile_header(header: dict[str, Any] | str, data: bytes = b"\0" * 16) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    return write


def pickles_only(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


F32 = {"dtype": "F32", "shape": [2]}
PLACED = [json.dumps(F32 | {"data_offsets": [start, start + 8]}) for start in (0, 8)]
# Name → what is done to a folder of `CONFIG`, the error and what it says.
DAMAGE: dict[str, tuple[Callable[[Path], object], type[M7Error], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ConfigError, "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), WeightsError, "no weights"),
    "pickle": (pickles_only("pytorch_model.bin"), WeightsError, "pickle.*safetensors version"),
    "another pickle": (pickles_only("consolidated.00.pth"), WeightsError, "pickle.*safetensors version"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), TokenizerError, "no tokenizer"),
    "missing shard": (drop_shard, WeightsError, "lacks b.safetensors"),
    "stray shard": (add_stray, WeightsError, "stray.safetensors"),
    "index against files": (move_tensor, WeightsError, "does not place there"),
    "two files, no index": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model2.safetensors"),
        WeightsError,
        "no model.safetensors.index",
    ),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), WeightsError, "index.json"),
    "empty index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), WeightsError, "weight_map"),
    "truncated": (truncate, WeightsError, "not a whole safetensors file"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), WeightsError, "not a whole"),
    "huge shape": (
        hostile_header({"a": F32 | {"shape": [2**32, 2**32], "data_offsets": [0, 8]}}),
        WeightsError,
        "not a whole",
    ),
    "overlap": (
        hostile_header({"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [4, 12]}}),
        WeightsError,
        "not a whole",
    ),
    "a hole": (
        hostile_header({"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [12, 20]}}, b"\0" * 20),
        WeightsError,
        "not a whole",
    ),
    "a tensor twice": (
        hostile_header('{"a": {0}, "b": {1}, "b": {1}}'.replace("{0}", PLACED[0]).replace("{1}", PLACED[1])),
        WeightsError,
        "'b' is there twice",
    ),
    "a tensor twice, in other words": (
        hostile_header('{"b": {1}, "a": {0}, "\\u0061": {0}}'.replace("{0}", PLACED[0]).replace("{1}", PLACED[1])),
        WeightsError,
        "'a' is there twice",
    ),
    "trailing bytes": (hostile_header({"a": F32 | {"data_offsets": [0, 8]}}), WeightsError, "not a whole"),
    "NaN": (
        lambda f: rewrite(f, lambda w: w["model.norm.weight"].fill(np.nan)),
        WeightsError,
        "model.norm.weight holds NaN",
    ),
    "infinite": (
        lambda f: rewrite(f, lambda w: w["lm_head.weight"].__setitem__((3, 4), np.inf)),
        WeightsError,
        "lm_head.weight holds",
    ),
    "missing tensor": (
        lambda f: rewrite(f, lambda w: w.pop("lm_head.weight")),
        WeightsError,
        "lm_head.weight is missing",
    ),
    "foreign tensor": (
        lambda f: rewrite(f, lambda w: w.update(extra=np.ones(3, np.float32))),
        WeightsError,
        "extra is not a part of mistral",
    ),
    "integer tensor": (
        lambda f: rewrite(f, lambda w: w.update({"model.norm.weight": np.ones(48, np.int32)})),
        WeightsError,
        "I32",
    ),
    "10⁹ layers": (lambda f: edit_config(f, num_hidden_layers=10**9), ConfigError, "num_hidden_layers"),
    "more layers than tensors": (lambda f: edit_config(f, num_hidden_layers=9999), WeightsError, "9999 layers"),
    "wrong shape": (
        lambda f: edit_config(f, intermediate_size=65),
        WeightsError,
        r"gate_proj.weight has shape \[64, 48\]",
    ),
    "architecture": (
        lambda f: edit_config(f, architectures=["PhiForCausalLM"]),
        ConfigError,
        "PhiForCausalLM is not supp",
    ),
    "tokenizer too large": (
        lambda f: shutil.copy(mistral_file("v3"), f / "tokenizer.model"),
        TokenizerError,
        "32768 tokens .* only 32000",
    ),
}
