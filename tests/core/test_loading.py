"""Loading: what goes in comes out, and nothing damaged, missing or foreign gets past the door."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from damage import CONFIG, DAMAGE, edit_config
from models import random_weights, shard, small_config, weights_on_disk, write_folder

import m7mlx.memory
from m7mlx import load, stream_generate
from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, InputError, NotFoundError, RunError, WeightsError
from m7mlx.files.weights import folder_weights, validate_header
from m7mlx.loading import build
from m7mlx.quantization import Quantization

IDS = mx.array([[1, 5, 900, 31999, 7]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", CONFIG)


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
@pytest.mark.usefixtures("without_kernels")
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


# --- refusals -------------------------------------------------------------------------------------


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
    """Nothing runs of the code that a folder brings along.

    transformers asks `trust_remote_code` for it, and mlx-lm runs it as a model of its own.
    """
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


def test_a_type_that_is_none_is_refused_first() -> None:
    for dtype in ("nonsense", "int8", 16):
        with pytest.raises(InputError, match="dtype must be one of float16, bfloat16, float32, not"):
            load("/no/such/folder", dtype=dtype)  # type: ignore[arg-type]


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
