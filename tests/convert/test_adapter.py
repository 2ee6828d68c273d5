"""LoRA adapters: merged as mlx-lm fuses its own, and by the formula for PEFT's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapters import ADAPTED, DOWN, EMBEDDING, HEAD, QUERY, RANK, break_config, random, write_mlx_lm, write_peft
from m7mlx_chat.cli import main as chat
from m7mlx_convert.cli import main
from m7mlx_convert.convert import convert
from m7mlx_convert.scheme import Recipe
from m7mlx_plan.cli import main as plan
from models import random_weights
from sources import assert_same, quantisable, read_weights, write_source

from m7mlx import load
from m7mlx.config import ModelConfig
from m7mlx.errors import InputError, WeightsError
from m7mlx.files import patterns
from m7mlx.quantization import Quantization

# --- mlx-lm's ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize(
    ("is_tied", "modules"),
    [(False, [QUERY, DOWN]), (False, [EMBEDDING]), (False, [HEAD, QUERY]), (True, [EMBEDDING, DOWN])],
)
def test_merged_as_mlx_lm_fuses_it(tmp_path: Path, kind: str, is_tied: bool, modules: list[str]) -> None:
    """Their model, their adapter, their fusing; then the same files through ours."""
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import load_adapters

    config = quantisable(tie_word_embeddings=is_tied)
    write_source(tmp_path / "source", config, mx.float32)
    weights = read_weights(tmp_path / "source")
    folder = tmp_path / "adapter"
    write_mlx_lm(folder, kind, modules)
    model: Any = llama.Model(llama.ModelArgs.from_dict(config.to_dict() | {"model_type": "llama"}))
    model.load_weights(list(weights.items()))
    load_adapters(model, str(folder))
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    assert len(fused) == (0 if kind == "full" else len(modules))
    model.update_modules(tree_unflatten(fused))
    out = convert(str(tmp_path / "source"), tmp_path / "out", adapter=str(folder))
    ours, theirs = read_weights(out), dict(tree_flatten(model.parameters()))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(np.array(ours[name]), np.array(array), rtol=1e-5, atol=1e-6, err_msg=name)
    changed = {name for name in weights if not mx.array_equal(ours[name], weights[name]).item()}
    assert changed == {f"{module}.weight" for module in modules}
    assert ModelConfig.from_folder(out).tie_word_embeddings is is_tied


MLX_LM_DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, mx.array]], object], str]] = {
    "another kind": (
        lambda s, a: s.update(fine_tune_type="ia3"),
        "fine_tune_type ia3 is none of lora, dora and full",
    ),
    "no scale": (lambda s, a: s.update(lora_parameters={"alpha": 16}), "names no scale"),
    "parameters in a list": (lambda s, a: s.update(lora_parameters=[3]), "cannot be used"),
    "a scale that is no number": (
        lambda s, a: s.update(lora_parameters={"scale": float("nan")}),
        "scale in lora_par",
    ),
    "DoRA without magnitudes": (lambda s, a: s.update(fine_tune_type="dora"), "has no magnitude"),
    "magnitudes without DoRA": (lambda s, a: a.update({f"{QUERY}.m": mx.ones((128,))}), "has a magnitude"),
    "half": (lambda s, a: a.pop(f"{QUERY}.lora_b"), "lora_B is missing for model.layers.1.self_attn.q_proj"),
    "a full one with other arrays": (lambda s, a: s.update(fine_tune_type="full"), "is not a part of a full"),
    "transposed": (
        lambda s, a: a.update({f"{QUERY}.lora_a": mx.zeros((RANK, 128)), f"{QUERY}.lora_b": mx.zeros((128, RANK))}),
        "does not fit",
    ),
}


@pytest.mark.parametrize("name", MLX_LM_DAMAGE)
def test_adapters_of_mlx_lm_that_cannot_be_merged(tmp_path: Path, name: str) -> None:
    write_source(tmp_path / "source", ADAPTED)
    folder = tmp_path / "adapter"
    write_mlx_lm(folder, "lora", [QUERY])
    settings = json.loads((folder / "adapter_config.json").read_text())
    arrays = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    change, message = MLX_LM_DAMAGE[name]
    change(settings, arrays)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    with pytest.raises(InputError, match=message):
        convert(str(tmp_path / "source"), tmp_path / "out", adapter=str(folder))


# --- PEFT's -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 8 / RANK),
        ({"use_rslora": True}, 8 / 2.0),
        ({"alpha_pattern": {"q_proj": 2}}, 2 / RANK),
        ({"alpha_pattern": {"k_proj": 2, "layers.0.self_attn.q_proj": 12}}, 12 / RANK),
        ({"alpha_pattern": {r"^model\.layers\.\d+\..*": 3, "q_proj": 5}}, 3 / RANK),
        ({"alpha_pattern": {"proj": 3, "[qk]_proj": 5}}, 5 / RANK),
    ],
)
def test_peft(tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    write_source(tmp_path / "source", ADAPTED, mx.bfloat16)
    module = "model.layers.0.self_attn.q_proj"
    head = random(*ADAPTED.weight_shapes()["lm_head.weight"], seed=5)
    extra = {"base_model.model.lm_head.weight": head}
    write_peft(tmp_path / "adapter", [module], extra, **settings)
    before = read_weights(tmp_path / "source")
    after = read_weights(convert(str(tmp_path / "source"), tmp_path / "out", adapter=str(tmp_path / "adapter")))
    rows, columns = ADAPTED.weight_shapes()[f"{module}.weight"]
    merged = before[f"{module}.weight"].astype(mx.float32) + scale * random(rows, RANK, seed=1) @ random(
        RANK, columns
    )
    expected = before | {f"{module}.weight": merged.astype(mx.bfloat16), "lm_head.weight": head.astype(mx.bfloat16)}
    assert_same(
        {k: v for k, v in after.items() if "q_proj" not in k},
        {k: v for k, v in expected.items() if "q_proj" not in k},
    )
    found = after[f"{module}.weight"].astype(mx.float32)
    assert mx.allclose(found, merged, rtol=1e-2, atol=1e-3).item()


def test_dora_of_peft_rescales_rows(tmp_path: Path) -> None:
    """Every row of a DoRA weight has the length that its magnitude says."""
    write_source(tmp_path / "source", ADAPTED, mx.float32)
    module = "model.layers.1.mlp.up_proj"
    magnitude = mx.arange(1, ADAPTED.intermediate_size + 1).astype(mx.float32)
    extra = {f"base_model.model.{module}.lora_magnitude_vector": magnitude}
    write_peft(tmp_path / "adapter", [module], extra, use_dora=True)
    found = read_weights(convert(str(tmp_path / "source"), tmp_path / "out", adapter=str(tmp_path / "adapter")))
    assert mx.allclose(mx.linalg.norm(found[f"{module}.weight"], axis=1), magnitude, rtol=1e-5).item()


def test_a_quantised_model_goes_back_to_its_bits(tmp_path: Path) -> None:
    write_source(tmp_path / "source", ADAPTED)
    base = convert(str(tmp_path / "source"), tmp_path / "base", recipe=Recipe(Quantization(32, 8)))
    write_peft(tmp_path / "adapter", ["model.layers.0.self_attn.v_proj"])
    out = convert(str(base), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    before, after = read_weights(base), read_weights(out)
    changed = {name for name in before if not mx.array_equal(before[name], after[name]).item()}
    assert changed == {f"model.layers.0.self_attn.v_proj.{kind}" for kind in ("weight", "scales", "biases")}
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())


# --- what cannot be merged --------------------------------------------------------------------


def rewrite(folder: Path, name: str, array: mx.array) -> None:
    arrays = mx.load(str(folder / "adapter_model.safetensors"))
    assert isinstance(arrays, dict)
    mx.eval(*arrays.values())
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays | {name: array})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter"),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "adapter_model.bin is pickle",
    ),
    "another method": (lambda f: break_config(f, peft_type="IA3"), "peft_type IA3 is not LORA"),
    "transposed": (lambda f: break_config(f, fan_in_fan_out=True), "fan_in_fan_out is not supported"),
    "no alpha": (lambda f: break_config(f, lora_alpha=None), "lora_alpha or lora_A is missing"),
    "alpha no number": (lambda f: break_config(f, lora_alpha="x"), "lora_alpha or alpha_pattern must be a number"),
    "alpha beyond floats": (lambda f: break_config(f, lora_alpha=10**400), "lora_alpha or alpha_pattern must be a"),
    "another model": (
        lambda f: rewrite(f, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", mx.zeros((4, 128))),
        "layers.9.mlp.up_proj",
    ),
    "another shape": (
        lambda f: rewrite(f, "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight", mx.zeros((4, 64))),
        "does not fit model.layers.0.self_attn.v_proj.weight",
    ),
    "half": (
        lambda f: rewrite(f, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", mx.zeros((4, 128))),
        "lora_B is missing for model.layers.0.mlp.up_proj",
    ),
    "whole and as LoRA": (
        lambda f: rewrite(f, "base_model.model.model.layers.0.self_attn.v_proj.weight", mx.zeros((64, 128))),
        "model.layers.0.self_attn.v_proj is there whole and as LoRA",
    ),
    "whole numbers": (
        lambda f: rewrite(f, "base_model.model.lm_head.weight", mx.zeros((32000, 128), mx.int32)),
        "lm_head.weight I32 [32000, 128], not floats",
    ),
    "DoRA without magnitudes": (lambda f: break_config(f, use_dora=True), "has no magnitude"),
    "an embedding's for a matrix": (
        lambda f: rewrite(f, "base_model.model.model.layers.0.mlp.up_proj.lora_embedding_A", mx.zeros((4, 128))),
        "does not belong to that kind of module",
    ),
    "a setting that is new": (lambda f: break_config(f, use_magic={"a": 1}), "use_magic is not supported"),
    "another bias": (lambda f: break_config(f, bias="some"), "bias some is not known"),
    "an infinite alpha": (lambda f: break_config(f, lora_alpha=float("inf")), "must be a number above 0"),
    "strange names": (lambda f: rewrite(f, "evil", mx.zeros(3)), "evil is not a part of a LoRA adapter"),
    "not finite": (
        lambda f: rewrite(
            f, "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight", mx.full((64, 4), float("nan"))
        ),
        "holds NaN or infinite numbers",
    ),
    "a pattern that is none": (lambda f: break_config(f, alpha_pattern={"(": 1}), "cannot be used"),
    "a pattern without an end": (
        lambda f: break_config(f, alpha_pattern={r"([a-z_.0-9]+)*!": 1, r"(?:(\w+)\.?)*!": 1}),
        "matching takes more than 1 s; write it simpler",
    ),
    "a pattern without an end, of another kind": (
        lambda f: break_config(f, alpha_pattern={"(.*)" * 30 + "!": 1}),
        "matching takes more than 1 s",
    ),
    "patterns in a list": (
        lambda f: break_config(f, alpha_pattern=["q_proj"]),
        "alpha_pattern must be an object, not",
    ),
    "a link": (lambda f: move_away(f / "adapter_model.safetensors"), "outside of the folder"),
}


def move_away(file: Path) -> None:
    place = file.parent.with_name("elsewhere")
    file.rename(place)
    file.symlink_to(place)


def test_patterns_that_nothing_here_reads_take_no_time(tmp_path: Path) -> None:
    """Which modules an adapter changes is said by the names of its tensors."""
    write_source(tmp_path / "source", ADAPTED)
    endless = r"(.*.*)*.*(a|aa)+!"
    write_peft(
        tmp_path / "adapter",
        ["model.layers.0.self_attn.v_proj"],
        target_modules=endless,
        exclude_modules=endless,
        layers_pattern=[endless],
        rank_pattern={endless: 3},
    )
    assert convert(str(tmp_path / "source"), tmp_path / "out", adapter=str(tmp_path / "adapter")).is_dir()


@pytest.mark.parametrize("name", DAMAGE)
def test_adapters_that_cannot_be_merged(
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 1.0)
    write_source(tmp_path / "source", ADAPTED)
    write_peft(tmp_path / "adapter", ["model.layers.0.self_attn.v_proj"])
    change, message = DAMAGE[name]
    change(tmp_path / "adapter")
    arguments = [
        str(tmp_path / "source"),
        "--adapter",
        str(tmp_path / "adapter"),
        "--mlx-path",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert message in error
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    write_source(tmp_path / "source", ADAPTED)
    with pytest.raises(InputError, match="is no folder here"):
        convert(str(tmp_path / "source"), tmp_path / "out", adapter=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({"base_model_name_or_path": "org/base"}, "org/base"),
        ({"model": "/my models/base"}, "'/my models/base'"),
        ({"base_model_name_or_path": "a\n\x1b[2J"}, "'a ␛[2J'"),
        ({"base_model_name_or_path": 3}, "MODEL"),
        ({}, "MODEL"),
    ],
)
@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors"])
def test_an_adapter_where_a_model_is_wanted(
    tmp_path: Path,
    settings: dict[str, Any],
    base: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Loading, converting, planning and chatting say what to do with it."""
    folder = tmp_path / "lora"
    folder.mkdir()
    for file in (name, "0000100_adapters.safetensors"):
        mx.save_safetensors(str(folder / file), {"x": mx.zeros((1,))})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    advice = f"is a LoRA adapter, which changes a model and is none; merge it into that model: m7mlx-convert {base} "
    with pytest.raises(WeightsError) as error:
        load(folder)
    assert f"{folder} {advice}--adapter {folder}" in str(error.value)
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (main, [str(folder)]),
        (main, [str(folder), "--plan"]),
        (plan, [str(folder)]),
        (chat, ["--model", str(folder), "-p", "Hello"]),
    ]
    for command, arguments in commands:
        assert command(arguments) == 2
        assert advice in capsys.readouterr().err.splitlines()[-1]


def test_an_adapter_beside_a_models_weights_is_no_model_less(tmp_path: Path) -> None:
    """The settings alone, left there by a merge, do no harm."""
    write_source(tmp_path / "source", ADAPTED)
    (tmp_path / "source" / "adapter_config.json").write_text("{}")
    assert convert(str(tmp_path / "source"), tmp_path / "out").is_dir()


def test_an_adapter_that_adds_nothing_changes_nothing(tmp_path: Path) -> None:
    """An adapter whose B is zero changes nothing."""
    write_source(tmp_path / "source", ADAPTED, mx.float32)
    write_peft(tmp_path / "adapter", ["model.layers.0.mlp.gate_proj"])
    shape = (ADAPTED.intermediate_size, RANK)
    rewrite(tmp_path / "adapter", "base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight", mx.zeros(shape))
    after = read_weights(convert(str(tmp_path / "source"), tmp_path / "out", adapter=str(tmp_path / "adapter")))
    assert_same(after, {name: mx.array(array) for name, array in random_weights(ADAPTED).items()})
