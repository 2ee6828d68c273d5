"""GGUF, exactly: every number as the `gguf` package reads it, rows in Hugging Face's order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import gguf_config, gguf_name, metadata_of, stored, weights_of, write_gguf
from m7mlx_convert.cli import main
from m7mlx_convert.convert import convert
from m7mlx_convert.gguf import open_gguf, repack
from m7mlx_convert.gguf_config import read_config
from sources import assert_same, permuted, read_weights

from m7mlx import load
from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, InputError, M7Error, TokenizerError, WeightsError


def expanded(out: Path) -> dict[str, np.ndarray]:
    """The weights of a converted folder as float32; quantised ones by w = scale · q + bias."""
    config = ModelConfig.from_folder(out)
    arrays = read_weights(out)
    weights = {}
    for name in config.weight_shapes():
        module = name.removesuffix(".weight")
        weight = arrays[name]
        if f"{module}.scales" in arrays:
            assert config.quantization is not None
            scheme = config.quantization.for_module(module)
            assert scheme is not None
            scales, biases = (arrays[f"{module}.{kind}"].astype(mx.float32) for kind in ("scales", "biases"))
            weight = mx.dequantize(weight, scales, biases, group_size=scheme.group_size, bits=scheme.bits)
        weights[name] = np.array(weight.astype(mx.float32))
    return weights


def assert_values(out: Path, config: ModelConfig, tensors: Mapping[str, tuple[np.ndarray, Kind]]) -> None:
    """Every weight equals what the `gguf` package expands, put back into Hugging Face's order."""
    found = expanded(out)
    for name in config.weight_shapes():
        data, kind = tensors[gguf_name(name)]
        expected = gguf.dequantize(data, kind)
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
        actual = permuted(found[name], heads) if heads else found[name]
        assert np.array_equal(actual, expected), name


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Kind.F32, mx.float32), (Kind.F16, mx.float16), (Kind.BF16, mx.bfloat16)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_plain_weights_equal_the_source(tmp_path: Path, kind: Kind, dtype: mx.Dtype, tied: bool) -> None:
    config = gguf_config(tie_word_embeddings=tied)
    write_gguf(tmp_path / "m.gguf", config, kind)
    out = convert(str(tmp_path / "m.gguf"), tmp_path / "out")
    expected = {name: mx.array(array).astype(dtype) for name, array in weights_of(config).items()}
    assert_same(read_weights(out), expected)
    assert load(out)[0].config == config


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q4_1, 4), (Kind.Q8_0, 8)])
def test_blocks_of_32_are_kept_without_loss(tmp_path: Path, kind: Kind, bits: int) -> None:
    config = gguf_config()
    tensors = write_gguf(tmp_path / "m.gguf", config, kind)
    out = convert(str(tmp_path / "m.gguf"), tmp_path / "out")
    assert_values(out, config, tensors)
    arrays = read_weights(out)
    assert arrays["lm_head.weight"].dtype == mx.uint32
    assert arrays["lm_head.scales"].dtype == arrays["model.norm.weight"].dtype == mx.float16
    written = json.loads((out / "config.json").read_text())["quantization"]
    assert written == {"group_size": 32, "bits": bits, "mode": "affine"}
    load(out)


def test_every_value_of_a_block_is_kept() -> None:
    """All 16 and all 256 codes, negative scales and the smallest ones."""
    scales = np.array([1, -0.37, 6e-8, 511.5, -2.5e-5], np.float16).view(np.uint8).reshape(5, 2)
    shifts = np.array([-3, 0.1, 6e-8, 60000, 2.5e-5], np.float16).view(np.uint8).reshape(5, 2)
    codes = np.random.default_rng(0).integers(0, 256, (5, 32), np.uint8)
    codes[0] = np.arange(32) * 8 + 7
    rows = {
        Kind.Q4_0: np.concatenate([scales, codes[:, :16]], axis=1),
        Kind.Q4_1: np.concatenate([scales, shifts, codes[:, :16]], axis=1),
        Kind.Q8_0: np.concatenate([scales, codes], axis=1),
    }
    for kind, data in rows.items():
        arrays = {name: mx.array(array) for name, array in repack(data, kind.name).items()}
        scale, bias = arrays["scales"].astype(mx.float32), arrays["biases"].astype(mx.float32)
        bits = 8 if kind is Kind.Q8_0 else 4
        found = mx.dequantize(arrays["weight"], scale, bias, group_size=32, bits=bits)
        assert np.array_equal(np.array(found), gguf.dequantize(data, kind)), kind


def test_each_module_has_its_own_bits(tmp_path: Path) -> None:
    config = gguf_config(tie_word_embeddings=True)
    special = {"model.embed_tokens.weight": Kind.Q8_0, "model.layers.1.mlp.down_proj.weight": Kind.F16}
    tensors = write_gguf(tmp_path / "m.gguf", config, Kind.Q4_1, special)
    out = convert(str(tmp_path / "m.gguf"), tmp_path / "out")
    assert_values(out, config, tensors)
    written = json.loads((out / "config.json").read_text())
    assert written["quantization"] == written["quantization_config"]
    assert written["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
        "model.layers.1.mlp.down_proj": False,
    }
    load(out)


@pytest.mark.parametrize("kind", [Kind.Q5_0, Kind.Q5_1])
def test_other_types_are_expanded(tmp_path: Path, kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    config = gguf_config()
    tensors = write_gguf(tmp_path / "m.gguf", config, kind)
    assert main([str(tmp_path / "m.gguf"), "--mlx-path", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert err == f"note: MLX has no counterpart of {kind.name}: these weights are expanded to float16\n"
    found = expanded(tmp_path / "out")["lm_head.weight"]
    assert np.array_equal(found, gguf.dequantize(*tensors["output.weight"]).astype(np.float16))
    assert read_weights(tmp_path / "out")["lm_head.weight"].dtype == mx.float16


def test_k_quants_are_expanded(tmp_path: Path) -> None:
    """Blocks of 256; the package cannot make them, so the codes are random and the scale is one."""
    config = gguf_config(hidden_size=256)
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (320, 210), np.uint8)
    blocks[:, -2:] = np.array([0.01], np.float16).view(np.uint8)
    tensors = write_gguf(tmp_path / "m.gguf", config, extra={"output.weight": (blocks, Kind.Q6_K)})
    out = convert(str(tmp_path / "m.gguf"), tmp_path / "out")
    expected = gguf.dequantize(*tensors["output.weight"]).astype(np.float16)
    assert np.array_equal(expanded(out)["lm_head.weight"], expected)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_1, Kind.Q5_0])
def test_quantised_on_request(tmp_path: Path, kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    config = gguf_config(head_dim=32, intermediate_size=128)
    tensors = write_gguf(tmp_path / "m.gguf", config, kind)
    assert main([str(tmp_path / "m.gguf"), "--mlx-path", str(tmp_path / "out"), "--q-bits", "6"]) == 0
    err = capsys.readouterr().err
    assert ("the losses add up" in err) == (kind is Kind.Q4_1)
    dtype = mx.float32 if kind is Kind.F32 else mx.float16
    whole = mx.array(gguf.dequantize(*tensors["output.weight"])).astype(dtype)
    arrays = read_weights(tmp_path / "out")
    for found, expected in zip(("weight", "scales", "biases"), mx.quantize(whole, 64, 6), strict=True):
        assert mx.array_equal(arrays[f"lm_head.{found}"], expected).item()
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert written == {"group_size": 64, "bits": 6, "mode": "affine"}


def test_scales_are_not_cast(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", gguf_config(), Kind.Q8_0)
    with pytest.raises(InputError, match="scales that --dtype bfloat16 would change"):
        convert(str(tmp_path / "m.gguf"), tmp_path / "out", dtype="bfloat16")
    convert(str(tmp_path / "m.gguf"), tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.F32, Kind.Q5_0])
@pytest.mark.parametrize("scale", [np.nan, np.inf, 60000.0])
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, kind: Kind, scale: float) -> None:
    """60,000 as a scale is finite, but −8 · 60,000 and −128 · 60,000 are not in float16."""
    config = gguf_config()
    data, _ = stored(config, {}, kind)["output.weight"]
    data.reshape(-1).view(np.uint8)[:2] = np.array([scale], np.float16).view(np.uint8)
    if kind is Kind.F32:
        data[0, 0] = scale
    write_gguf(tmp_path / "m.gguf", config, kind, extra={"output.weight": (data, kind)})
    if scale == 60000.0 and kind in (Kind.F16, Kind.F32, Kind.Q4_1):
        convert(str(tmp_path / "m.gguf"), tmp_path / "out")
        return
    with pytest.raises(WeightsError, match=r"lm_head\.weight holds (NaN or infinite numbers|numbers too large)"):
        convert(str(tmp_path / "m.gguf"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


# --- metadata ---------------------------------------------------------------------------------


def test_config_of_the_metadata(tmp_path: Path) -> None:
    """Floats lose their float32 tails; end ids are gathered; licence and name come along."""
    config = gguf_config(norm_eps=1e-5, rope_theta=1e5, head_dim=32)
    changes = {"general.license": "apache-2.0", "general.name": "Little", "tokenizer.ggml.eot_token_id": 7}
    write_gguf(tmp_path / "m.gguf", config, changes=changes)
    out = convert(str(tmp_path / "m.gguf"), tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    assert written["rms_norm_eps"] == 1e-5
    assert written["rope_theta"] == 100000.0
    assert written["head_dim"] == 32
    assert written["eos_token_id"] == [1, 7]
    assert written["model_type"] == "llama"
    assert "sliding_window" not in written
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "# Little\n" in card


def test_what_the_metadata_leaves_out(tmp_path: Path) -> None:
    absent = ("llama.attention.key_length", "llama.attention.value_length", "llama.rope.freq_base")
    write_gguf(tmp_path / "m.gguf", gguf_config(n_kv_heads=4), changes=dict.fromkeys(absent))
    config = open_gguf(tmp_path / "m.gguf").config
    assert (config.head_dim, config.rope_theta) == (16, 10000.0)
    changes = dict.fromkeys((*absent, "llama.rope.dimension_count", "llama.attention.head_count_kv"))
    write_gguf(tmp_path / "n.gguf", gguf_config(n_kv_heads=4), changes=changes)
    assert open_gguf(tmp_path / "n.gguf").config == config


def test_a_sliding_window_makes_it_mistral(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", gguf_config(), changes={"llama.attention.sliding_window": 100})
    out = convert(str(tmp_path / "m.gguf"), tmp_path / "out")
    assert load(out)[0].config.sliding_window == 100
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]


@pytest.mark.parametrize(("theta", "window"), [(1e4, 4096), (1e6, None)])
def test_mistral_7b_is_known_by_its_shape(theta: float, window: int | None) -> None:
    """v0.1 has a window, which llama.cpp's converter drops; v0.2 and v0.3 have none."""
    values = metadata_of(
        gguf_config(
            hidden_size=4096,
            intermediate_size=14336,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            rope_theta=theta,
        )
    ) | {"general.architecture": "llama"}
    shapes = {str(i): (32000, 4096) for i in range(291)} | {"token_embd.weight": (32000, 4096)}
    config, notes = read_config(Path("mistral.gguf"), values, shapes)
    assert config.sliding_window == window
    assert bool(notes) == bool(window)


SENTENCEPIECE: dict[str, Any] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 259}
TOO_MANY_TOKENS: dict[str, Any] = {
    "tokenizer.ggml.tokens": [str(i) for i in range(321)],
    "tokenizer.ggml.token_type": [1] * 321,
    "tokenizer.ggml.merges": ["1 2"],
}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"llama.expert_count": 8}, ConfigError, r"mixtures of experts are not supported \(llama.expert_count = 8\)"),
        (
            {"llama.rope.scaling.type": "yarn"},
            ConfigError,
            r"scaled RoPE is not supported \(llama.rope.sc",
        ),
        ({"llama.attention.scale": 0.1}, ConfigError, r"not supported \(llama.attention.scale = 0.1"),
        ({"llama.rope.dimension_count": 8}, ConfigError, "RoPE over a part of the head"),
        ({"llama.attention.value_length": 8}, ConfigError, "keys and values of different lengths"),
        ({"llama.attention.head_count": None}, ConfigError, "llama.attention.head_count is missing"),
        ({"llama.attention.head_count": [4, 4]}, ConfigError, "n_heads must be a whole number"),
        ({"llama.attention.head_count": 0}, ConfigError, "n_heads must be a whole number"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, ConfigError, "metadata cannot be understood"),
        ({"llama.rope.freq_base": float("nan")}, ConfigError, "rope_theta must be a number above 0"),
        ({"llama.context_length": True}, ConfigError, "max_position_embeddings must be a whole number"),
        ({"llama.block_count": 4_000_000_000}, ConfigError, "num_hidden_layers must be a whole number"),
        ({"llama.block_count": 3}, WeightsError, "tensor blk.2.attn_norm.weight is missing"),
        ({"llama.block_count": 1}, WeightsError, "tensor blk.1.attn_k.weight is not a part of"),
        ({"llama.embedding_length": 32}, WeightsError, r"has shape \[320, 64\], its metadata says \[320, 32\]"),
        ({"tokenizer.ggml.eos_token_id": 320}, ConfigError, "token id 320 is not one of its 320 tokens"),
        ({"tokenizer.ggml.bos_token_id": "x"}, ConfigError, "token id x is not one of"),
        ({"split.count": 3}, ConfigError, "one of several parts"),
        ({"tokenizer.ggml.pre": "viking"}, TokenizerError, "viking of cutting text .* is not supported"),
        ({"tokenizer.ggml.pre": None}, TokenizerError, "None of cutting text"),
        ({"tokenizer.ggml.model": "rwkv"}, TokenizerError, "tokenizer rwkv is not supported"),
        ({"tokenizer.ggml.tokens": None}, TokenizerError, "holds no tokenizer"),
        ({"tokenizer.ggml.tokens": [1, 2]}, TokenizerError, "holds no tokenizer"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, TokenizerError, "2 tokens have no type each"),
        ({"tokenizer.ggml.tokens": ["a"] * 259}, TokenizerError, "stands twice in its vocabulary"),
        ({"tokenizer.ggml.merges": None}, TokenizerError, "has no merges"),
        ({"tokenizer.ggml.merges": ["ab"]}, TokenizerError, "has no merges"),
        ({"tokenizer.ggml.merges": ["zzz yyy"]}, TokenizerError, "cannot be used as a tokenizer"),
        ({"tokenizer.ggml.model": "llama"}, TokenizerError, "no score for each token"),
        (SENTENCEPIECE | {"tokenizer.ggml.unknown_token_id": 4_000_000_000}, TokenizerError, "tokenizer is damaged"),
        (SENTENCEPIECE | {"tokenizer.ggml.token_type": [9] * 259}, TokenizerError, "tokenizer is damaged"),
        (SENTENCEPIECE | {"tokenizer.ggml.token_type": [1] * 259}, TokenizerError, "not a sentencepiece model"),
        (TOO_MANY_TOKENS, TokenizerError, "has 321 tokens but the model's embedding only 320"),
    ],
)
def test_metadata_that_is_not_understood(
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[M7Error],
    says: str,
) -> None:
    write_gguf(tmp_path / "m.gguf", gguf_config(), changes=changes)
    with pytest.raises(error, match=says):
        convert(str(tmp_path / "m.gguf"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_foreign_architectures_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "m.gguf", gguf_config(), architecture="qwen3moe")
    assert main([str(tmp_path / "m.gguf"), "--mlx-path", str(tmp_path / "out")]) == 2
    assert "architecture 'qwen3moe' is not supported; supported is llama" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"blk.0.attn_q.bias": (np.zeros(64, np.float32), Kind.F32)}, "tensor blk.0.attn_q.bias is not a part of"),
        ({"rope_freqs.weight": (np.full(8, 2, np.float32), Kind.F32)}, "tensor rope_freqs.weight is not a part of"),
        ({"output.weight": (np.zeros((320, 64), np.int8), Kind.I8)}, "tensors of type I8 are not supported"),
        ({"token_embd.weight": (np.zeros(64, np.float32), Kind.F32)}, "token_embd.weight is missing or no matrix"),
    ],
)
def test_tensors_that_are_not_understood(
    tmp_path: Path,
    extra: dict[str, tuple[np.ndarray, Kind]],
    says: str,
) -> None:
    write_gguf(tmp_path / "m.gguf", gguf_config(), extra=extra)
    with pytest.raises(WeightsError, match=says):
        open_gguf(tmp_path / "m.gguf")


def test_rope_factors_of_one_change_nothing(tmp_path: Path) -> None:
    ones = {"rope_freqs.weight": (np.ones(8, np.float32), Kind.F32)}
    write_gguf(tmp_path / "m.gguf", gguf_config(), extra=ones)
    assert open_gguf(tmp_path / "m.gguf").config == gguf_config()
