"""Schemes and recipes.

Every one loads in mlx-lm with equal weights, mixes are mlx-lm's, rules mean what they say.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from m7mlx_convert.cli import main
from m7mlx_convert.convert import convert
from m7mlx_convert.scheme import MIXED, Recipe, Rule, make_scheme
from models import named_arrays
from peers import silenced
from sources import quantisable, read_weights, write_source

from m7mlx import load
from m7mlx.config import ModelConfig
from m7mlx.cpu import native
from m7mlx.errors import InputError
from m7mlx.files import patterns
from m7mlx.quantization import Quantization

IDS = mx.array([[0, 17, 200, 5, 99, 42, 7]])
SCHEMES = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
SCHEMES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


@pytest.mark.parametrize(("mode", "bits", "group"), SCHEMES)
def test_every_scheme_is_mlx_lms(
    tmp_path: Path,
    mlx_lm: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    bits: int,
    group: int,
) -> None:
    """Their converter gives the same bits.

    What ours writes, theirs and ours load, with the same numbers.
    """
    from mlx_lm.convert import convert as their_convert

    write_source(tmp_path / "source", quantisable(), torch_dtype="bfloat16")
    scheme = make_scheme(mode, bits, group)
    out = convert(str(tmp_path / "source"), tmp_path / "out", recipe=Recipe(scheme))
    with silenced():
        their_convert(
            str(tmp_path / "source"),
            str(tmp_path / "theirs"),
            quantize=True,
            q_group_size=group,
            q_bits=bits,
            q_mode=mode,
        )
        loaded = mlx_lm.load(str(out))[0]
    found, expected = read_weights(out), read_weights(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)
    assert all(mx.array_equal(found[name], array).item() for name, array in named_arrays(loaded).items())
    assert config_of(out)["quantization"] == config_of(tmp_path / "theirs")["quantization"]
    ours, _ = load(out)
    expanded = convert(str(out), tmp_path / "floats", recipe=Recipe(dequantize=True), dtype="float32")
    monkeypatch.setattr(native, "rounds_inputs", lambda: False)
    both = [model(IDS, model.new_cache(kv_bits=32)) for model in (ours, load(expanded)[0])]
    assert mx.abs(both[0] - both[1]).max() < 1e-5 * mx.abs(both[1]).max()


def config_of(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return data


@pytest.mark.parametrize("name", MIXED)
def test_mixes_are_mlx_lms(tmp_path: Path, mlx_lm: ModuleType, name: str) -> None:
    from mlx_lm.convert import convert as their_convert

    write_source(tmp_path / "source", quantisable(n_layers=9))
    assert main([str(tmp_path / "source"), "--quant-predicate", name, "--mlx-path", str(tmp_path / "out")]) == 0
    with silenced():
        their_convert(str(tmp_path / "source"), str(tmp_path / "theirs"), quantize=True, quant_predicate=name)
    found, expected = read_weights(tmp_path / "out"), read_weights(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[key], expected[key]).item() for key in expected)
    ours, them = (ModelConfig.from_folder(tmp_path / folder).quantization for folder in ("out", "theirs"))
    assert ours and them
    for module in (key.removesuffix(".weight") for key in quantisable(n_layers=9).weight_shapes()):
        if "norm" not in module:
            assert ours.for_module(module) == them.for_module(module), module
    with silenced():
        assert mlx_lm.load(str(tmp_path / "out"))[0]
    assert mx.array_equal(load(tmp_path / "out")[0](IDS), load(tmp_path / "theirs")[0](IDS)).item()


def test_rules(tmp_path: Path) -> None:
    write_source(tmp_path / "source", quantisable())
    rules = ["v_proj=8:32", "lm_head|embed=none", r"layers\.1\.mlp=mxfp4", "layers.1=3"]
    arguments = [argument for rule in rules for argument in ("--q-rule", rule)]
    assert main([str(tmp_path / "source"), "--q-bits", "4", *arguments, "--mlx-path", str(tmp_path / "out")]) == 0
    quantization = ModelConfig.from_folder(tmp_path / "out").quantization
    assert quantization
    for module, scheme in {
        "model.layers.0.mlp.up_proj": Quantization(64, 4),
        "model.layers.1.self_attn.v_proj": Quantization(32, 8),  # the first that matches counts
        "model.layers.1.self_attn.q_proj": Quantization(64, 3),
        "model.layers.1.mlp.up_proj": Quantization(32, 4, "mxfp4"),
        "lm_head": None,
    }.items():
        assert quantization.for_module(module) == scheme, module
    load(tmp_path / "out")


def test_rules_alone_leave_the_rest_as_it_is(tmp_path: Path) -> None:
    weights = write_source(tmp_path / "source", quantisable())
    assert main([str(tmp_path / "source"), "--q-rule", "lm_head=6", "--mlx-path", str(tmp_path / "out")]) == 0
    found = read_weights(tmp_path / "out")
    assert found.keys() == weights.keys() | {"lm_head.scales", "lm_head.biases"}
    assert all(mx.array_equal(found[name], weights[name]).item() for name in weights if name != "lm_head.weight")
    load(tmp_path / "out")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("v_proj", "is no rule"),
        ("=4", "is no rule"),
        ("(=4", "is no regular expression"),
        ("v_proj=7", "7"),
        ("v_proj=4:48", "48"),
        ("v_proj=q4", "is no scheme"),
        ("v_proj=", "is no scheme"),
        ("nothing_like_it=4", "matches nothing"),
        (r"([a-z_.0-9]+)*!=4", "matching takes more than 1 s; write it simpler"),
    ],
)
def test_rules_that_are_none(
    tmp_path: Path,
    rule: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 1.0)
    write_source(tmp_path / "source", quantisable())
    assert main([str(tmp_path / "source"), "--q-rule", rule, "--mlx-path", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("mode", "bits", "group"), [("affine", 7, 64), ("mxfp4", 3, 32), ("nvfp4", 4, 32), ("x", 4, 64)]
)
def test_schemes_that_are_none(mode: str, bits: int, group: int) -> None:
    with pytest.raises(InputError):
        make_scheme(mode, bits, group)


def test_a_rule_is_read_as_written() -> None:
    assert Rule.parse("a=b=5", 32).pattern.pattern == "a=b"
    assert Rule.parse("a=5", 32).scheme == Quantization(32, 5)
    assert Rule.parse("a=5").scheme == Quantization(64, 5)
