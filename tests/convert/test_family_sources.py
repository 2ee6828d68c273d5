"""The newer Mistrals in every form that they are published in: one model, whatever the form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapters import DOWN, QUERY
from family import (
    FAMILY,
    as_stored,
    decode_fp8,
    ministral3,
    mistral,
    rounded,
    write_family,
    write_own_layout,
    write_safetensors,
    write_wrapped,
)
from gguf_files import write_family_gguf
from m7mlx_chat.catalog import describe
from m7mlx_convert.cli import main
from m7mlx_convert.convert import convert
from m7mlx_convert.opening import open_model
from m7mlx_convert.scheme import Recipe
from m7mlx_plan.weights import list_weights
from models import named_arrays
from sources import assert_same, permuted, read_weights
from values import number

from m7mlx import load
from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, WeightsError
from m7mlx.files.weights import folder_weights, parameters
from m7mlx.loading import load_model
from m7mlx.quantization import Quantization
from m7mlx.shard import MODES, Mode, Shard

LEFT_OUT = "also sees pictures; its vision tower is left out"


def config_without_ids(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says of the model; params.json has no ids of tokens."""
    data = ModelConfig.from_folder(folder).to_dict()
    return {key: value for key, value in data.items() if key not in ("bos_token_id", "eos_token_id")}


# --- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("form", ["wrapped", "wrapped by transformers 5", "Mistral's own"])
def test_every_form_is_the_same_model(tmp_path: Path, kind: str, form: str) -> None:
    config = FAMILY[kind]()
    plain = write_family(tmp_path / "plain", config)
    if form == "Mistral's own":
        write_own_layout(tmp_path / "source", config)
    else:
        write_wrapped(tmp_path / "source", config, is_new=form.endswith("5"))
    out = convert(str(tmp_path / "source"), tmp_path / "out")
    assert_same(read_weights(out), read_weights(plain))
    assert config_without_ids(out) == config_without_ids(plain)
    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == config.to_dict()["architectures"]
    assert not {"text_config", "vision_config", "image_token_index", "quantization_config"} & written.keys()


@pytest.mark.parametrize("kind", FAMILY)
def test_a_gguf_file_is_the_same_model(tmp_path: Path, kind: str) -> None:
    config = FAMILY[kind]()
    plain = write_family(tmp_path / "plain", config)
    write_family_gguf(tmp_path / "model.gguf", config, rounded(config))
    out = convert(str(tmp_path / "model.gguf"), tmp_path / "out", dtype="bfloat16")
    assert_same(read_weights(out), read_weights(plain))
    found, expected = ModelConfig.from_folder(out), ModelConfig.from_folder(plain)
    assert found.rope == expected.rope
    assert found.windows == expected.windows
    assert (found.model_type == "ministral3") == (kind == "ministral3")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope.scaling.yarn_attn_factor": 1.5}, "yarn_attn_factor = 1.5 contradicts"),
        ({"rope.scaling.yarn_ext_factor": 0.5}, "YaRN in part is not supported"),
        ({"rope.scaling.yarn_log_multiplier": float("nan")}, "yarn_log_multiplier must be a number above 0"),
        ({"attention.temperature_length": 64}, "attention.temperature_length that is not the original context"),
        ({"attention.sliding_window": 7, "attention.sliding_window_pattern": 2}, "must say true or false of each"),
        (
            {"attention.sliding_window": 7, "attention.sliding_window_pattern": [True]},
            "must say true or false of each",
        ),
    ],
)
def test_gguf_files_that_say_something_else(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    config = ministral3()
    write_family_gguf(tmp_path / "model.gguf", config, rounded(config), **changes)
    with pytest.raises(ConfigError, match=says):
        open_model(tmp_path / "model.gguf", "model", None)


def test_a_factor_without_a_type_divides_positions_in_llama_cpp(tmp_path: Path) -> None:
    config = mistral()
    write_family_gguf(tmp_path / "model.gguf", config, rounded(config), **{"rope.scaling.factor": 2.0})
    with pytest.raises(ConfigError, match=r"scaled RoPE is not supported \(llama.rope.scaling.type = linear"):
        open_model(tmp_path / "model.gguf", "model", None)


def test_what_sees_pictures_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = mistral()
    plain = write_family(tmp_path / "plain", config)
    wrapped = write_wrapped(tmp_path / "wrapped", config)
    assert main([str(wrapped), "--mlx-path", str(tmp_path / "out")]) == 0
    assert LEFT_OUT in " ".join(capsys.readouterr().err.split())
    with pytest.warns(UserWarning, match=LEFT_OUT):
        model, _ = load(wrapped)
    ids = mx.array([[5, 9, 200, 7, 31, 4]])
    assert mx.array_equal(model(ids), load(plain)[0](ids)).item()
    own = write_own_layout(tmp_path / "own", config, vision_encoder={"hidden_size": 8})
    tensors = {name: as_stored(np.array(array)) for name, array in read_all(own).items()}
    seeing = (
        "vision_encoder.ln_pre.weight",
        "vision_language_adapter.w_in.weight",
        "patch_merger.merging_layer.weight",
    )
    extra = {name: as_stored(np.ones((4, 4))) for name in (*seeing, "pre_mm_projector_norm.weight")}
    write_safetensors(own / "consolidated.safetensors", tensors | extra)
    opened = open_model(own, "own", None)
    assert opened.tensors.keys() == config.weight_shapes().keys()
    assert any(LEFT_OUT in note for note in opened.notes)


def read_all(folder: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(folder / "consolidated.safetensors"))
    assert isinstance(arrays, dict)
    return {name: array.astype(mx.float32) for name, array in arrays.items()}


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    config = mistral()
    folder = write_wrapped(tmp_path / "wrapped", config)
    tensors = {f"language_model.{name}": as_stored(array) for name, array in rounded(config).items()}
    twice = {"model.norm.weight": tensors["language_model.model.norm.weight"]}
    write_safetensors(folder / "model.safetensors", tensors | twice)
    with pytest.raises(WeightsError, match=r"both language_model\.model\.norm\.weight and model\.norm\.weight|both "):
        convert(str(folder), tmp_path / "out")


def test_overrides_of_a_wrapper_are_the_text_models(tmp_path: Path) -> None:
    """mlx-lm names the modules of a mixed recipe as the wrapper does."""
    config = mistral(hidden_size=64, head_dim=16, intermediate_size=64)
    module = "model.layers.1.mlp.down_proj"
    scheme = {"group_size": 32, "bits": 4, f"language_model.{module}": {"group_size": 32, "bits": 8}}
    folder = write_wrapped(tmp_path / "wrapped", config, quantization=scheme)
    read = ModelConfig.from_folder(folder).quantization
    assert read is not None
    assert read.for_module(module) == Quantization(32, 8)
    assert Quantization.from_dict(scheme).for_module(module) == Quantization(32, 8)


# --- FP8 ------------------------------------------------------------------------------------------

Scales = Callable[[tuple[int, ...]], np.ndarray]


def per_tensor(shape: tuple[int, ...]) -> np.ndarray:
    return np.array(2.0**-6 * 1.25, np.float32)


def per_row(shape: tuple[int, ...]) -> np.ndarray:
    return np.linspace(0.5, 1.5, shape[0], dtype=np.float32).reshape(-1, 1) * np.float32(2**-6)


def per_block(shape: tuple[int, ...]) -> np.ndarray:
    rows, columns = (-(-side // 32) for side in shape)
    return np.linspace(0.5, 1.5, rows * columns, dtype=np.float32).reshape(rows, columns) * np.float32(2**-6)


BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True}
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": WEIGHTS | {"strategy": "channel"}, "targets": ["Linear"]}},
}
PER_TENSOR = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
OWN = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}


def fp8(
    config: ModelConfig, scales: Scales, scale: str, activation: str | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The tensors of an FP8 folder, and the bfloat16 numbers that they stand for."""
    rng = np.random.default_rng(8)
    tensors, expected = {}, rounded(config)
    for name, array in expected.items():
        if "proj" not in name:
            tensors[name] = as_stored(array)
            continue
        codes = rng.integers(0, 256, array.shape).astype(np.uint8)
        codes[codes & 127 == 127] = 8  # no NaN
        # BF16, as Mistral stores scales
        factor = np.array(mx.array(scales(array.shape)).astype(mx.bfloat16).astype(mx.float32))
        whole = factor
        if (factor.ndim == 2 and factor.shape[1] > 1) or (factor.ndim == 2 and factor.shape[0] != array.shape[0]):
            whole = np.repeat(np.repeat(factor, 32, 0), 32, 1)[: array.shape[0], : array.shape[1]]
        tensors[name] = ("F8_E4M3", array.shape, codes.tobytes())
        module = name.removesuffix("weight")
        tensors[module + scale] = as_stored(factor)
        if activation:
            tensors[module + activation] = as_stored(np.array(0.5))
        expected[name] = decode_fp8(codes) * whole
    return tensors, expected


def own_names(config: ModelConfig, tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors under the names and in the order of Mistral's own layout."""
    from m7mlx_convert.native import NAMES

    found = {}
    for name, (dtype, shape, data) in tensors.items():
        module, _, kind = name.rpartition(".")
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(module.split(".")[-1])
        if heads and kind == "weight":
            rows = np.frombuffer(data, np.uint8).reshape(shape[0], -1)
            data = permuted(rows, heads).tobytes()
        part = module.split(".", 3)[-1] if "layers" in module else module
        prefix = f"layers.{module.split('.')[2]}." if "layers" in module else ""
        found[f"{prefix}{NAMES[part]}.{kind}"] = (dtype, shape, data)
    return found


def assert_expected(out: Path, expected: dict[str, np.ndarray]) -> None:
    assert_same(read_weights(out), {name: mx.array(array).astype(mx.bfloat16) for name, array in expected.items()})


def test_every_code_is_read_as_it_is_defined() -> None:
    codes = np.arange(256, dtype=np.uint8)
    found = np.array(mx.from_fp8(mx.array(codes), mx.float32))
    np.testing.assert_array_equal(found, decode_fp8(codes))
    np.testing.assert_array_equal(np.signbit(found), codes >= 128)


@pytest.mark.oracle
def test_every_code_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(np.array(mx.from_fp8(mx.array(codes), mx.float32)), expected)


@pytest.mark.parametrize(
    ("scales", "scale", "activation", "settings"),
    [
        (per_tensor, "weight_scale_inv", "activation_scale", PER_TENSOR),
        (per_tensor, "weight_scale", "input_scale", PER_TENSOR),
        (per_block, "weight_scale_inv", None, BLOCKS),
        (per_row, "weight_scale", "input_scale", CHANNELS),
    ],
)
def test_fp8_is_read_exactly(
    tmp_path: Path,
    scales: Scales,
    scale: str,
    activation: str | None,
    settings: dict[str, Any],
) -> None:
    config = ministral3()
    tensors, expected = fp8(config, scales, scale, activation)
    folder = write_wrapped(tmp_path / "fp8", config, tensors=tensors, quantization_config=settings)
    with pytest.raises(ConfigError, match="are not MLX's; convert them"):
        ModelConfig.from_folder(folder)
    opened = open_model(folder, "fp8", None)
    assert any("FP8 activations are left out" in note for note in opened.notes) == bool(activation)
    out = convert(str(folder), tmp_path / "out")
    assert_expected(out, expected)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_mistrals_own_fp8_is_read_exactly(tmp_path: Path) -> None:
    config = ministral3()
    tensors, expected = fp8(config, per_tensor, "qscale_weight", "qscale_act")
    folder = write_own_layout(tmp_path / "own", config, own_names(config, tensors), quantization=OWN)
    assert_expected(convert(str(folder), tmp_path / "out"), expected)


def test_fp8_is_quantised_as_what_it_stands_for(tmp_path: Path) -> None:
    config = ministral3(hidden_size=128, head_dim=32, intermediate_size=256)
    tensors, expected = fp8(config, per_tensor, "weight_scale_inv", None)
    write_wrapped(tmp_path / "fp8", config, tensors=tensors, quantization_config=PER_TENSOR)
    recipe = Recipe(Quantization(64, 4))
    found = read_weights(convert(str(tmp_path / "fp8"), tmp_path / "out", recipe=recipe))
    module = "model.layers.0.mlp.up_proj"
    # From the exact numbers, not from bfloat16 ones.
    packed = mx.quantize(mx.array(expected[f"{module}.weight"]), 64, 4)[0]
    assert mx.array_equal(found[f"{module}.weight"], packed).item()


def test_fp8_takes_the_memory_that_is_planned(tmp_path: Path) -> None:
    from m7mlx_convert.plan import make_plan

    config = ministral3()
    tensors, _ = fp8(config, per_tensor, "weight_scale_inv", None)
    folder = write_wrapped(tmp_path / "fp8", config, tensors=tensors, quantization_config=PER_TENSOR)
    plan = make_plan(open_model(folder, "fp8", None), Recipe(), None)
    found = {planned.name: planned for planned in plan.parameters}["model.layers.0.mlp.up_proj.weight"]
    size = config.hidden_size * config.intermediate_size
    assert found.memory == size * (1 + 4 + 2)  # codes, float32, bfloat16


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda t, c: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), WeightsError, "has no scale beside it"),
        (
            lambda t, c: t.update({"model.layers.0.mlp.up_proj.weight_scale": as_stored(np.array(1.0))}),
            WeightsError,
            "has several scales",
        ),
        (
            lambda t, c: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": as_stored(np.ones((3, 1)))}),
            WeightsError,
            r"BF16 \[3, 1\], which does not fit",
        ),
        (
            lambda t, c: t.update({"model.layers.0.mlp.up_proj.zero": as_stored(np.ones(1))}),
            WeightsError,
            "up_proj.zero is not a part of ministral3",
        ),
        (lambda t, c: c.update(fmt="e5m2"), ConfigError, "FP8 of the kind e5m2 cannot be read"),
        (lambda t, c: c.update(weight_block_size=[0, 128]), ConfigError, r"blocks of \[0, 128\] cannot be read"),
        (lambda t, c: c.update(quant_method="bitsandbytes"), ConfigError, "quantised by bitsandbytes cannot be read"),
        (
            lambda t, c: c.update(quant_method="compressed-tensors", format="pack-quantized", config_groups={}),
            ConfigError,
            "compressed as pack-quantized cannot be read",
        ),
    ],
)
def test_fp8_that_cannot_be_read(
    tmp_path: Path,
    change: Callable[[dict[str, Any], dict[str, Any]], object],
    error: type[Exception],
    says: str,
) -> None:
    config = ministral3()
    tensors, _ = fp8(config, per_tensor, "weight_scale_inv", None)
    settings = dict(PER_TENSOR)
    change(tensors, settings)
    folder = write_wrapped(tmp_path / "fp8", config, tensors=tensors, quantization_config=settings)
    with pytest.raises(error, match=says):
        open_model(folder, "fp8", None)


def test_a_code_that_is_no_number_is_refused(tmp_path: Path) -> None:
    config = ministral3()
    tensors, _ = fp8(config, per_tensor, "weight_scale_inv", None)
    name = "model.layers.1.self_attn.v_proj.weight"
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, b"\x7f" + data[1:])
    folder = write_wrapped(tmp_path / "fp8", config, tensors=tensors, quantization_config=PER_TENSOR)
    with pytest.raises(WeightsError, match=rf"{name} holds NaN"):
        convert(str(folder), tmp_path / "out")


# --- LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_a_wrapper_changes_its_text(tmp_path: Path, prefix: str) -> None:
    config = mistral()
    plain = write_family(tmp_path / "plain", config)
    rng, rank = np.random.default_rng(2), 2
    settings = {"peft_type": "LORA", "lora_alpha": 4, "r": rank, "alpha_pattern": {}}
    shapes = config.weight_shapes()
    parts: dict[str, np.ndarray] = {}
    for module in (QUERY, DOWN):
        rows, columns = shapes[f"{module}.weight"]
        parts[f"{module}.lora_A.weight"] = rng.standard_normal((rank, columns)).astype(np.float32)
        parts[f"{module}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(np.float32)
    seeing = {"model.vision_tower.x.lora_A.weight": np.ones((2, 4), np.float32)}
    theirs = {prefix + name.removeprefix("model."): array for name, array in parts.items()} | seeing
    for folder, named in (("theirs", theirs), ("ours", parts)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(settings))
        arrays = {f"base_model.model.{name}": mx.array(array) for name, array in named.items()}
        mx.save_safetensors(str(tmp_path / folder / "adapter_model.safetensors"), arrays)
    ids = mx.array([[5, 9, 200, 7]])
    logits = [load(plain, adapter_path=tmp_path / name)[0](ids) for name in ("theirs", "ours")]
    assert mx.array_equal(logits[0], logits[1]).item()
    assert number(mx.abs(logits[0] - load_model(plain)(ids)).max()) > 1e-3


def test_everything_that_lists_weights_finds_the_text_models(tmp_path: Path) -> None:
    config = mistral()
    plain = write_family(tmp_path / "plain", config)
    wrapped = write_wrapped(tmp_path / "wrapped", config, is_new=True)
    headers = folder_weights(wrapped)
    assert parameters(wrapped, config, headers).keys() == config.weight_shapes().keys()
    assert headers["model.norm.weight"].name == "model.language_model.norm.weight"
    assert list_weights(str(wrapped), None)[1] == list_weights(str(plain), None)[1]
    ours, theirs = describe("a", wrapped), describe("b", plain)
    assert not ours.problem
    assert (ours.nbytes, ours.memory, ours.bits) == (theirs.nbytes, theirs.memory, theirs.bits)


@pytest.mark.parametrize("mode", MODES)
def test_a_shard_of_the_wrapper_is_that_of_its_text(tmp_path: Path, mode: Mode) -> None:
    config = mistral()
    plain = write_family(tmp_path / "plain", config)
    wrapped = write_wrapped(tmp_path / "wrapped", config)
    with pytest.warns(UserWarning, match=LEFT_OUT):
        found = named_arrays(load(wrapped, shard=Shard(mode, 1, 2))[0])
    assert_same(found, named_arrays(load(plain, shard=Shard(mode, 1, 2))[0]))
