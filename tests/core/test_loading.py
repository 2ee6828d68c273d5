"""Loading: what goes in comes out, and nothing damaged, missing or foreign gets past the door."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from models import mistral_file, random_weights, small_config, weights_on_disk, write_folder

import m7mlx.memory
from m7mlx import load, stream_generate
from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, M7Error, NotFoundError, RunError, TokenizerError, WeightsError
from m7mlx.files.weights import folder_weights, validate_header
from m7mlx.loading import build
from m7mlx.quantization import Quantization

CONFIG = small_config(vocab_size=32000, n_layers=1)
IDS = mx.array([[1, 5, 900, 31999, 7]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", CONFIG)


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


def test_single_and_sharded_folders_give_the_same_model(folder: Path) -> None:
    expected = load(folder)[0](IDS)
    shard(folder)
    seen: list[tuple[int, int]] = []
    model, tokenizer = load(str(folder), progress=lambda done, total: seen.append((done, total)))
    assert mx.array_equal(model(IDS), expected).item()
    assert tokenizer.chat.encode([{"role": "user", "content": "Hello"}])[:3] == [1, 733, 16289]
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_weights_arrive_unchanged(folder: Path) -> None:
    model, _ = load(folder)
    assert model.config == CONFIG
    found = weights_on_disk(model)
    assert all(np.array_equal(found[name], array) for name, array in random_weights(CONFIG).items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_quantised_weights_expanded_or_not_give_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, tied: bool, dtype: mx.Dtype
) -> None:
    overrides = {"model.embed_tokens": Quantization(32, 8)}
    config = small_config(
        hidden_size=64,
        intermediate_size=128,
        tie_word_embeddings=tied,
        quantization=Quantization(32, 4, overrides=overrides),
    )
    weights: dict[str, mx.array] = {}
    for name, array in random_weights(config).items():
        path = name.removesuffix(".weight")
        scheme = config.quantization.for_module(path) if config.quantization and array.ndim == 2 else None
        if scheme:
            packed = mx.quantize(mx.array(array).astype(dtype), group_size=scheme.group_size, bits=scheme.bits)
            weights |= {f"{path}.{kind}": a for kind, a in zip(("weight", "scales", "biases"), packed, strict=True)}
        else:
            weights[name] = mx.array(array)
    expanded = build(config, dict(weights))
    assert isinstance(expanded.model.layers[0].mlp.down_proj, nn.Linear)
    monkeypatch.setattr(sys.modules["m7mlx.loading"], "expands", lambda *_: False)
    packed_model = build(config, dict(weights))
    assert isinstance(packed_model.model.layers[0].mlp.down_proj, nn.QuantizedLinear)
    assert packed_model.nbytes < expanded.nbytes / 3
    ids = mx.array([[1, 2, 3, 50]])
    assert mx.allclose(expanded(ids), packed_model(ids), rtol=1e-3, atol=1e-3).item()
    assert packed_model(ids).dtype == mx.float32  # 16-bit arithmetic is emulated on a CPU


def test_a_dtype_can_be_asked_for(folder: Path) -> None:
    assert load(folder, dtype=mx.bfloat16)[0](IDS).dtype == mx.bfloat16


def test_harmless_extras_are_left_out(folder: Path) -> None:
    config = small_config(vocab_size=32000, n_layers=1, tie_word_embeddings=True)
    extras = {
        "lm_head.weight": random_weights(config)["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8),
    }
    write_folder(folder, config, random_weights(config) | extras)
    assert load(folder)[0].config.tie_word_embeddings


# --- refusals -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_are_refused_in_one_line(folder: Path, name: str) -> None:
    damage, error, reason = DAMAGE[name]
    damage(folder)
    with pytest.raises(error, match=reason) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_model_larger_than_the_machine_is_refused_with_the_sum(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m7mlx.memory, "machine_memory", lambda: 12_000_000)
    monkeypatch.setattr(sys.modules["m7mlx.loading"], "machine_memory", lambda: 12_000_000)
    with pytest.raises(RunError, match=r"0\.0 GB for its weights and 0\.0 GB for 7 tokens"):
        load(folder)


def test_no_program_of_a_folder_runs(folder: Path, tmp_path: Path) -> None:
    """What transformers asks `trust_remote_code` for, and what mlx-lm runs as a model of its own."""
    ran = tmp_path / "RAN"
    for name in ("modeling", "tokenization", "configuration", "model", "__init__"):
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: ...\n")
    code = {"auto_map": {"AutoConfig": "configuration.Evil", "AutoModelForCausalLM": "modeling.Evil"}}
    edit_config(folder, model_file="model.py", **code)
    settings = {"auto_map": {"AutoTokenizer": ["tokenization.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model, tokenizer = load(folder)
    assert list(stream_generate(model, tokenizer, "Hi", max_tokens=2))
    assert not ran.exists()


def test_mistrals_own_copy_of_the_weights_is_no_stray_file(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no weights in Hugging Face's layout"):
        load(folder)


def test_names_that_lead_nowhere() -> None:
    for name in ("/no/such/folder", "./missing", "nothing", "a/b/c", "", "~nobody/x", "bad repo/name"):
        with pytest.raises(NotFoundError, match="no alias"):
            load(name)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_bytes(b"text")
    with pytest.raises(ConfigError, match="is a file, but not GGUF"):
        load(tmp_path / "model.txt")


def test_group_sizes_must_divide(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    weights = random_weights(config) | {"lm_head.scales": np.ones((32000, 1), np.float32)}
    write_folder(folder, config, weights)
    edit_config(folder, quantization={"group_size": 64, "bits": 4})
    with pytest.raises(WeightsError, match="48 columns"):
        load(folder)


def test_headers_list_types_and_shapes(folder: Path) -> None:
    header = validate_header(folder / "model.safetensors")
    assert header["model.norm.weight"] == ("F32", (48,))
    assert folder_weights(folder).keys() == CONFIG.weight_shapes().keys() == header.keys()
