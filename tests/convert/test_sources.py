"""Equal logits come from equal weights in every form that a conversion reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf_files import write_mistral_gguf
from m7mlx_convert.cli import main
from m7mlx_convert.convert import convert
from m7mlx_convert.scheme import Recipe
from models import small_config, write_folder
from sources import (
    LLAMA,
    assert_same,
    native_weights,
    read_weights,
    write_native,
    write_packed,
    write_sharded,
)
from values import number

from m7mlx import load
from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, WeightsError
from m7mlx.quantization import Quantization

IDS = mx.array([[1, 5, 9, 31999, 7, 7, 123, 4567, 2, 8, 13, 21]])


def write_gguf_file(path: Path) -> None:
    write_mistral_gguf(path, LLAMA, "F32")


@pytest.mark.parametrize("write", [write_sharded, write_native, write_gguf_file])
def test_every_form_gives_the_same_logits(tmp_path: Path, write: Callable[[Path], None]) -> None:
    expected = load(write_folder(tmp_path / "plain", LLAMA))[0](IDS)
    write(tmp_path / "source")
    out = convert(str(tmp_path / "source"), tmp_path / "out", dtype="float32")
    difference = mx.abs(load(out)[0](IDS) - expected).max()
    assert number(difference) < 1e-5 * number(mx.abs(expected).max())


def test_mistrals_own_layout_becomes_hugging_faces_bit_for_bit(tmp_path: Path) -> None:
    config = small_config(vocab_size=32000)  # a window of 7
    write_native(tmp_path / "native", config)
    with pytest.raises(WeightsError, match=r"only Mistral's: m7mlx-convert"):
        load(tmp_path / "native")
    ours, _ = load(convert(str(tmp_path / "native"), tmp_path / "out"))
    plain, _ = load(write_folder(tmp_path / "plain", config))
    assert ours.config.sliding_window == 7
    assert mx.array_equal(ours(IDS), plain(IDS)).item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.1.attention.wv.weight"), "layers.1.attention.wv.weight is missing"),
        (lambda w: w.update({"layers.0.moe": mx.zeros(3)}), "layers.0.moe is not a part of a plain Mistral"),
        (lambda w: w.update({"norm.weight": mx.zeros(3)}), r"norm.weight is F32 \[3\]"),
    ],
)
def test_mistrals_own_layout_damaged(
    tmp_path: Path,
    change: Callable[[dict[str, mx.array]], object],
    message: str,
) -> None:
    write_native(tmp_path / "native")
    weights = native_weights(LLAMA)
    change(weights)
    mx.save_safetensors(str(tmp_path / "native" / "consolidated.safetensors"), weights)
    with pytest.raises(WeightsError, match=message):
        convert(str(tmp_path / "native"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_mlx_folder_gives_the_same_logits_expanded(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain", LLAMA)
    quantised = convert(str(tmp_path / "plain"), tmp_path / "q", recipe=Recipe(Quantization(32, 5)))
    floats = convert(str(quantised), tmp_path / "f", recipe=Recipe(dequantize=True), dtype="float32")
    both = [model(IDS, model.new_cache(kv_bits=32)) for model in (load(floats)[0], load(quantised)[0])]
    assert mx.abs(both[0] - both[1]).max() < 1e-5 * mx.abs(both[1]).max()


# --- AWQ and GPTQ -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "bits", "settings"),
    [
        ("awq", 4, {"version": "gemm"}),
        ("awq", 4, {"symmetric": True}),
        ("gptq", 4, {}),
        ("gptq", 8, {}),
        ("gptq", 2, {}),
        ("gptq", 2, {"checkpoint_format": "gptq_v2"}),
        ("gptq", 4, {"format": "gptq_v2"}),
        ("gptq", 4, {"symmetric": True}),
    ],
)
def test_packed_checkpoints_stay_quantised(tmp_path: Path, method: str, bits: int, settings: dict[str, Any]) -> None:
    expected = write_packed(tmp_path / "packed", method, bits, **settings)
    out = convert(str(tmp_path / "packed"), tmp_path / "out")
    written = ModelConfig.from_folder(out).quantization
    assert written and written.for_module("model.layers.1.mlp.up_proj") == Quantization(32, bits)
    assert written.for_module("lm_head") is None
    floats = convert(str(out), tmp_path / "floats", recipe=Recipe(dequantize=True), dtype="float32")
    found = mx.load(str(floats / "model.safetensors"))
    assert isinstance(found, dict)
    for name, array in expected.items():
        # A bias, −zero · scale, is stored in 16 bits: half a unit of the 11th place of 15 · 0.02.
        np.testing.assert_allclose(np.array(found[name]), array, atol=2e-3 if bits == 8 else 2e-4, err_msg=name)


def test_awq_as_mlx_lm_reads_it(tmp_path: Path) -> None:
    from mlx_lm.utils import _transform_awq_weights

    write_packed(tmp_path / "packed", "awq", 4)
    given = mx.load(str(tmp_path / "packed" / "model.safetensors"))
    assert isinstance(given, dict)
    theirs, _ = _transform_awq_weights(given, {"bits": 4, "group_size": 32})
    ours = mx.load(str(convert(str(tmp_path / "packed"), tmp_path / "out") / "model.safetensors"))
    assert isinstance(ours, dict)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised by bitsandbytes cannot be read"),
        ({"quant_method": ["awq"]}, "cannot be read"),
        ({"quant_method": "gptq", "bits": 3}, "gptq with 3 bits"),
        ({"quant_method": "awq", "bits": 4, "group_size": -1}, "groups of -1"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
            "in the layout marlin",
        ),
        ({"quant_method": "awq", "bits": "4", "group_size": 32}, "awq with 4 bits"),
    ],
)
def test_packings_without_a_counterpart(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write_packed(tmp_path / "packed", "awq", 4)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(ConfigError, match=message):
        convert(str(tmp_path / "packed"), tmp_path / "out")


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_biases_of_zeros_are_left_out_and_others_are_refused(tmp_path: Path, method: str, dtype: mx.Dtype) -> None:
    write_packed(tmp_path / "packed", method, 4)
    without = read_weights(convert(str(tmp_path / "packed"), tmp_path / "without"))
    file = tmp_path / "packed" / "model.safetensors"
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    mx.eval(*arrays.values())
    packed = [name.removesuffix(".qweight") for name in arrays if name.endswith(".qweight")]
    arrays |= {f"{module}.bias": mx.zeros((arrays[f"{module}.scales"].shape[1],), dtype) for module in packed}
    mx.save_safetensors(str(file), arrays)
    assert_same(read_weights(convert(str(tmp_path / "packed"), tmp_path / "with")), without)
    last = f"{packed[-1]}.bias"
    for value in (1e-4, float("nan")):
        arrays[last] = mx.concatenate([arrays[last][:-1] * 0, mx.array([value], dtype)])
        mx.save_safetensors(str(file), arrays)
        with pytest.raises(WeightsError, match=f"{last} is not zero"):
            convert(str(tmp_path / "packed"), tmp_path / "out")


def test_gptq_in_activation_order_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_packed(tmp_path / "packed", "gptq", 4)
    file = tmp_path / "packed" / "model.safetensors"
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    mx.eval(*arrays.values())
    arrays["model.layers.1.self_attn.q_proj.g_idx"] = arrays["model.layers.1.self_attn.q_proj.g_idx"][::-1]
    mx.save_safetensors(str(file), arrays)
    assert main([str(tmp_path / "packed"), "--mlx-path", str(tmp_path / "out")]) == 2
    assert "model.layers.1.self_attn.q_proj was quantised in activation order" in capsys.readouterr().err
