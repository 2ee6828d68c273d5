"""m7mlx-bench: real engines in processes of their own, on a tiny model and on the demo model."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from m7mlx_bench import rounds, worker
from m7mlx_bench.cli import main
from m7mlx_bench.gguf_copy import write_gguf
from m7mlx_bench.models import SHAPES, find_gguf, find_readable, write_random
from m7mlx_bench.report import Figure, Results, cell, figures, ratio, roofline, spread
from PIL import Image

from m7mlx.config import ModelConfig
from m7mlx.errors import InputError, RunError
from m7mlx.loading import load_model
from m7mlx.quantization import Quantization

TINY = ["--layers", "2", "--hidden", "64", "--feed-forward", "128", "--heads", "1", "--kv-heads", "1"]
TINY += ["--vocab", "400", "--window", "24"]
QUICK = ["--prompt", "9", "40", "--positions", "16", "300", "--tokens", "2"]


@pytest.mark.oracle
def test_every_engine_chooses_the_same_and_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within the window, where mlx-lm is right too."""
    result, picture, drawing = (tmp_path / name for name in ("all.json", "all.png", "all.svg"))
    engines = ["m7mlx", "m7mlx compiled", "m7mlx kv8", "mlx-lm", "mlx-lm rotating", "transformers"]
    options = [*TINY[:-1], "64", *QUICK, "--rounds", "2", "--engines", ",".join(engines)]
    plots = ["--save", str(result), "--plot", str(picture), "--plot", str(drawing)]
    assert main([*options, *plots]) == 0
    shown = capsys.readouterr().out
    data = json.loads(result.read_text())
    assert list(data["runs"]) == engines
    assert all(len(runs) == 2 for runs in data["runs"].values())
    for engine, runs in data["runs"].items():
        for run in runs:
            if engine != "m7mlx kv8":
                assert run["tokens"] == data["runs"]["m7mlx"][0]["tokens"], engine
            assert set(run["prefill"]) == {"9", "40"}
            assert set(run["decode"]) == {"9", "16", "300"}
            assert min(*run["prefill"].values(), *run["decode"].values(), run["first_s"], run["rss"]) > 0
    held = {engine: runs[0]["kv"]["300"] for engine, runs in data["runs"].items()}
    row = 2 * 2 * 64 * 4  # layers, keys and values, head_dim, bytes
    assert held["m7mlx"] == held["m7mlx compiled"] == row * (64 + 8)
    assert held["mlx-lm"] >= row * 300 > held["mlx-lm rotating"]
    assert held["m7mlx kv8"] < held["m7mlx"] / 3
    assert len(data["bandwidth"]) == 2 and min(data["bandwidth"]) > 1e8
    assert "mlx-lm attends to the whole sequence" in shown
    assert "of the limit by bandwidth" in shown
    with Image.open(picture) as image:
        assert image.width > 1000
    assert ET.parse(drawing).getroot().tag.endswith("svg")


@pytest.mark.demo
def test_the_demo_model_is_what_is_measured_by_default(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    demo_model: Path,
) -> None:
    jobs: list[worker.Job] = []

    def answer(job: str, show: object) -> str:
        given = json.loads(job)
        if given is None:
            return "1e10"
        if given["pace"] is None:
            return "1e3"
        jobs.append(worker.Job(**given))
        if given["engine"] == "transformers":
            raise RunError("no kernel image is available")
        return json.dumps(run_of(2.0))

    monkeypatch.setattr(rounds, "run_worker", answer)
    # No engine but the first runs here.
    monkeypatch.setattr("m7mlx_bench.engines.is_available", lambda name: True)
    assert main(["--engines", "m7mlx,mlx-lm,mlx-lm rotating,transformers", "--rounds", "1", "--prompt", "8"]) == 0
    shown = capsys.readouterr().out
    assert [job.engine for job in jobs] == ["m7mlx", "mlx-lm", "transformers"]
    assert jobs[0].folder == str(demo_model)
    assert "mlx-lm rotating left out: the model has no window" in shown
    assert "transformers failed: no kernel image is available" in shown
    assert "with float32 scales" in shown


def test_copies_for_peers_hold_the_same_numbers(tmp_path: Path) -> None:
    config = SHAPES["small"]
    changes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 300}
    quantised = {"quantization": {"group_size": 64, "bits": 4}}
    config = ModelConfig.from_dict(config.to_dict() | changes | quantised)
    write_random(tmp_path / "model", config)
    ids = mx.array([[1, 2, 3, 250]])
    expected = np.array(load_model(tmp_path / "model")(ids))
    for engine in ("mlx-lm", "transformers"):
        folder, note = find_readable(engine, tmp_path / "model", tmp_path)
        assert "float32" in note
        assert folder != tmp_path / "model"
        np.testing.assert_allclose(np.array(load_model(folder)(ids)), expected, rtol=1e-4, atol=1e-4)
        assert find_readable(engine, tmp_path / "model", tmp_path)[0] == folder  # not written again
    assert find_readable("m7mlx", tmp_path / "model", tmp_path) == (tmp_path / "model", "")


def test_no_room_for_weights_is_found_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = SimpleNamespace(free=10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["--shape", "7b", "--q-bits", "4", "-q"]) == 2
    assert "4.1 GB of weights are to be written" in (said := capsys.readouterr().err)
    assert "has room for 1.0 GB; name a folder with more in TMPDIR" in said
    usage.free = 10**12
    scheme = Quantization(64, 4)
    write_random(tmp_path / "model", replace(SHAPES["small"], n_layers=1, quantization=scheme))
    usage.free = 1000
    with pytest.raises(InputError, match=r"has room for 0\.0 GB"):
        find_gguf(None, tmp_path / "model", tmp_path)
    with pytest.raises(InputError, match=r"has room for 0\.0 GB"):
        find_readable("mlx-lm", tmp_path / "model", tmp_path)


@pytest.mark.demo
def test_llama_cpp_reads_the_file_that_a_model_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo model's own, one that is given as the model or beside it, or a copy."""
    read: list[str] = []

    def answer(job: str, show: object) -> str:
        given = json.loads(job)
        if given is None:
            return "1e10"
        if given["pace"] is None:
            read.append(Path(given["folder"]).name)
        return json.dumps(run_of(1.0) if given["pace"] else 1e3)

    own = tmp_path / "own.gguf"
    own.write_bytes(b"GGUF")
    monkeypatch.setattr(rounds, "run_worker", answer)
    monkeypatch.setattr("m7mlx_bench.engines.is_available", lambda name: True)
    monkeypatch.setattr("m7mlx.files.demo.fetch_demo_gguf", lambda: own)
    other = tmp_path / "other.gguf"
    write_gguf(demo_model, other)
    for options in (["demo"], ["demo", "--gguf", str(other)], [str(demo_model)], [*TINY, "--q-bits", "4"]):
        assert main([*options, "--engines", "llama.cpp", "--rounds", "1", "--prompt", "8", "-q"]) == 0
    assert read == ["own.gguf", "other.gguf", "model.gguf", "model.gguf"]
    shown = capsys.readouterr().out
    assert "llama.cpp reads own.gguf" in shown
    assert "llama.cpp reads the same numbers as Q8_0, Q4_1" in shown
    assert "llama.cpp reads the same numbers as Q4_0" in shown


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["demo", "--shape", "small"], "leave out either MODEL or the options"),
        (["--engines", "vllm"], "there is no engine 'vllm'; there are m7mlx, "),
        (["--against", "vllm"], "there is no engine 'vllm'; there are m7mlx, "),
        (["--gguf", "/no/such.gguf"], "/no/such.gguf is not a file"),
        (["--plot", "figures.gif"], "a plot is a .png or .svg file"),
        (["--save", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--heads", "3"], "heads"),
        (["--hidden", "100", "--q-bits", "4"], "do not divide"),
        (["--rounds", "0"], "'0' is not a positive number"),
        (["--window", "some"], "'some' is not a positive number"),
        (["/no/such/model"], "/no/such/model"),
    ],
)
def test_bad_input_is_one_line(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(options)
    except SystemExit as left:
        status = int(left.code or 0)
    assert status == 2
    said = capsys.readouterr().err
    assert reason in said
    assert len(said.splitlines()) == 1


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert main(["--engines", "llama.cpp"]) == 2
    assert capsys.readouterr().err == "m7mlx-bench: error: llama.cpp is not installed: pip install llama-cpp-python\n"


def test_a_worker_that_fails_says_why() -> None:
    job = worker.Job("m7mlx", "/no/such/folder", [4], [], 1, 300)
    with pytest.raises(RunError, match="/no/such/folder"):
        rounds.run_worker(job.dumps(), print)


def run_of(scale: float) -> dict[str, Any]:
    return {
        "first_s": 1 / scale,
        "load_s": 0.1,
        "tokens": [1, 2],
        "start_rss": 10**8,
        "rss": 10**8,
        "mapped": 10**7,
        "cut": [],
        "prefill": {"8": 100 * scale},
        "decode": {"8": 10 / scale, "1024": 20 / scale, "4096": 25 / scale},
        "kv": {"1024": 10**6, "4096": 10**6},
        "moved": 10**8,
    }


def test_ratios_are_medians_of_rounds_and_better_above_one() -> None:
    results = Results({"name": "x", "window": None}, {}, [8], [1024], 2, bandwidth=[2e10, 1e10, 3e10])
    results.runs = {"m7mlx": [run_of(s) for s in (2, 6, 4)], "mlx-lm": [run_of(s) for s in (1, 2, 2)]}
    start, prefill, decode = figures(results)[:3]
    assert [ratio(results, figure, "m7mlx") for figure in (start, prefill, decode)] == [2, 2, 2]
    assert cell(results, prefill, "m7mlx") == "400.0 (200.0–600.0) 2.00×"
    assert cell(results, prefill, "mlx-lm") == "200.0 (100.0–200.0)"
    assert cell(results, Figure("nothing", lambda run: None), "m7mlx") == "–"
    assert spread([3.0]) == "3.0"
    # 101 MB at 20 GB/s are 5.05 ms; the middle round takes 20 / 4 ms.
    assert roofline(results)[1][1:] == ["101%", "50%"]
