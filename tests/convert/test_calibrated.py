"""Quantising by data: mlx-lm's four ways, from our sources to folders that both load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from m7mlx_convert import calibrated
from m7mlx_convert.cli import main
from m7mlx_convert.folder import open_folder
from models import named_arrays, small_config, write_folder
from peers import silenced
from sources import read_weights
from tokenizer_folders import write_transformers_tokenizer
from values import number

from m7mlx import load
from m7mlx.config import ModelConfig
from m7mlx.memory import machine_memory
from m7mlx.rope import RopeScaling

CONFIG = small_config(vocab_size=32000, hidden_size=64, intermediate_size=128, n_layers=2)
IDS = mx.array([[1, 5, 9, 31999, 7, 400]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("calibrated") / "source", CONFIG)
    write_transformers_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    return folder


@pytest.mark.parametrize("method", ["awq", "gptq", "dynamic", "dwq"])
def test_every_way(
    source: Path,
    tmp_path: Path,
    mlx_lm: ModuleType,
    method: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = ["--calibrate", method, "--q-bits", "4", "--q-group-size", "32", "--calibration-tokens", "1024"]
    assert main([str(source), *options, "--mlx-path", str(out), "-q"]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    found = ModelConfig.from_folder(out).quantization
    assert found and found.for_module("model.layers.0.mlp.up_proj")
    weights = read_weights(out)
    assert weights["model.norm.weight"].dtype == mx.bfloat16
    assert weights["model.layers.1.mlp.up_proj.scales"].dtype == mx.bfloat16
    # It is not the plain quantisation, but as near to the source: data had a say.
    assert main([str(source), *options[2:6], "--mlx-path", str(tmp_path / "plain"), "-q"]) == 0
    plain = read_weights(tmp_path / "plain")
    assert any(name not in plain or not mx.array_equal(weights[name], plain[name]).item() for name in weights)
    ours, expected = load(out)[0](IDS), load(source)[0](IDS)
    distance = number(mx.linalg.norm((ours - expected).reshape(-1)) / mx.linalg.norm(expected.reshape(-1)))
    assert distance < 0.5
    with silenced():
        their_model = mlx_lm.load(str(out))[0]
    assert all(mx.array_equal(weights[name], array).item() for name, array in named_arrays(their_model).items())
    assert f"--calibrate {method}" in (out / "README.md").read_text()


def test_dynamic_bits_meet_their_target(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--calibrate",
        "dynamic",
        "--q-group-size",
        "32",
        "--target-bpw",
        "5.5",
        "--calibration-tokens",
        "1024",
    ]
    assert main([str(source), *options, "--mlx-path", str(tmp_path / "out"), "-q"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "out"), "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert 5.0 <= plan["bits_per_weight"] <= 6.2
    assert len({group["stored"] for group in plan["groups"]}) == 3  # low, high and the norms


def test_the_plan_says_what_it_takes(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), "--calibrate", "dynamic", "--q-group-size", "32", "--plan"]) == 0
    out = capsys.readouterr().out
    assert "calibrating (dynamic) holds the whole model" in out
    assert "5 a weight on average" in out


def test_what_cannot_be_calibrated(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*options: str) -> str:
        assert main([*options, "--mlx-path", str(tmp_path / "out"), "--q-group-size", "32"]) in (1, 2)
        return capsys.readouterr().err

    assert main([str(source), "--q-bits", "4", "--mlx-path", str(tmp_path / "four"), "-q"]) == 0
    capsys.readouterr()
    assert "is quantised already" in refused(str(tmp_path / "four"), "--calibrate", "awq")
    assert "GPTQ has 2, 4 and 8 bits" in refused(str(source), "--calibrate", "gptq", "--q-bits", "3")
    assert "dynamic bits start from" in refused(str(source), "--calibrate", "dynamic", "--q-bits", "8")
    (tmp_path / "short.txt").write_text("too short")
    short = ("--calibration-text", str(tmp_path / "short.txt"))
    assert "1,024 are the least" in refused(str(source), "--calibrate", "awq", *short)
    (tmp_path / "short.txt").write_bytes(b"\xff")
    assert "is no text" in refused(str(source), "--calibrate", "awq", *short)
    monkeypatch.setattr(calibrated, "machine_memory", lambda: machine_memory() // 10**7)
    assert "of memory, this machine has" in refused(str(source), "--calibrate", "gptq")
    assert not (tmp_path / "out").exists()


def test_the_model_that_is_calibrated_is_the_source(tmp_path: Path, mlx_lm: ModuleType) -> None:
    """YaRN included: what mlx-lm computes for short sequences is what the source does."""
    yarn = RopeScaling(64, factor=8.0, attention_factor=1.2, query_beta=0.1)
    variants: list[dict[str, Any]] = [
        {"sliding_window": 7},
        {"model_type": "ministral3", "rope_theta": 1e6, "rope_scaling": yarn},
    ]
    for changes in variants:
        folder = write_folder(tmp_path / str(len(changes)), replace(CONFIG, **changes))
        model = calibrated._mlx_lm_model(open_folder(folder, "m"), mx.float32)
        assert mx.allclose(model(IDS), load(folder)[0](IDS), atol=1e-3).item()
