"""The converter: the source's numbers, mlx-lm's layout bit for bit, never a broken result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from damage import DAMAGE
from m7mlx_convert.cli import main
from m7mlx_convert.convert import convert
from m7mlx_convert.scheme import Recipe
from m7mlx_convert.writer import Spec, TensorBytes, WeightsWriter
from models import named_arrays, random_weights, shard, small_config, write_folder
from processes import running
from tokenizer_folders import write_transformers_tokenizer
from values import number

from m7mlx import load
from m7mlx.config import ModelConfig
from m7mlx.errors import M7Error, RunError
from m7mlx.files.weights import INDEX, validate_header
from m7mlx.quantization import Quantization

CONFIG = small_config(vocab_size=32000, hidden_size=64, intermediate_size=128, n_layers=2)
IDS = mx.array([[1, 5, 900, 31999, 7]])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "source", CONFIG)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"auto_map": {"x": "modeling_evil.X"}, "license": "mit"}))
    return folder


def arrays(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        found |= loaded
    return found


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and mx.array_equal(a[k], b[k]).item() for k in a)


# --- the numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_without_options_the_numbers_stay(source: Path, tmp_path: Path, sharded: bool) -> None:
    before = arrays(source)
    if sharded:
        shard(source)
    out = convert(str(source), tmp_path / "out")
    assert same(arrays(out), before)
    assert mx.array_equal(load(out)[0](IDS), load(source)[0](IDS)).item()


@pytest.mark.parametrize(
    ("name", "dtype"), [("float16", mx.float16), ("bfloat16", mx.bfloat16), ("float32", mx.float32)]
)
def test_dtype_casts(source: Path, tmp_path: Path, name: str, dtype: mx.Dtype) -> None:
    expected = {k: v.astype(dtype) for k, v in arrays(source).items()}
    assert same(arrays(convert(str(source), tmp_path / "out", dtype=name)), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32), (3, 64), (6, 32)])
def test_quantised_as_mlx_lm_does_it(tmp_path: Path, bits: int, group: int, tied: bool) -> None:
    """Same settings, same bits: weights, scales, biases, and the config that says so."""
    from mlx_lm.convert import convert as theirs

    config = small_config(
        vocab_size=32000, hidden_size=64, intermediate_size=128, n_layers=2, tie_word_embeddings=tied
    )
    folder = write_folder(tmp_path / "source", config)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float16"}))
    write_transformers_tokenizer(folder)
    ours = convert(str(folder), tmp_path / "ours", recipe=Recipe(Quantization(group, bits)))
    theirs(str(folder), str(tmp_path / "theirs"), quantize=True, q_bits=bits, q_group_size=group)
    assert same(arrays(ours), arrays(tmp_path / "theirs"))
    assert read(ours)["quantization"] == read(tmp_path / "theirs")["quantization"]
    assert read(ours)["quantization"] == read(ours)["quantization_config"]
    # What each writes, the other loads, with equal logits.
    import mlx_lm

    their_model = mlx_lm.load(str(ours))[0]
    assert same(named_arrays(their_model), arrays(ours))
    expected = load(ours)[0](IDS)
    assert mx.array_equal(load(tmp_path / "theirs")[0](IDS), expected).item()
    difference = mx.abs(their_model(IDS).astype(mx.float32) - expected).max() / mx.abs(expected).max()
    assert number(difference) < 0.02  # theirs computes in float16 here


def read(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return data


def test_a_quantised_folder_is_kept_quantised_again_or_expanded(
    source: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    first = convert(str(source), tmp_path / "first", recipe=Recipe(Quantization(64, 4)))
    second = convert(str(first), tmp_path / "second")
    assert same(arrays(first), arrays(second))
    assert read(second) == read(first)
    same_bits = convert(str(first), tmp_path / "same", recipe=Recipe(Quantization(64, 4)))
    assert same(arrays(first), arrays(same_bits))  # nothing is lost twice
    assert main([str(first), "--q-bits", "8", "--mlx-path", str(tmp_path / "third")]) == 0
    assert "quantised again: the losses add up" in capfd.readouterr().err
    assert main([str(first), "-d", "--mlx-path", str(tmp_path / "floats")]) == 0
    assert capfd.readouterr().err == ""
    kept, plain, again = arrays(first), arrays(tmp_path / "floats"), arrays(tmp_path / "third")
    assert plain.keys() == CONFIG.weight_shapes().keys()
    assert "quantization" not in read(tmp_path / "floats")
    for name, weight in plain.items():
        if weight.ndim == 1:
            continue
        scales, biases = (kept[f"{name.removesuffix('.weight')}.{kind}"] for kind in ("scales", "biases"))
        assert mx.array_equal(weight, mx.dequantize(kept[name], scales, biases, group_size=64, bits=4)).item()
        expected = mx.quantize(weight, group_size=64, bits=8)
        assert mx.array_equal(again[name], expected[0]).item()


def test_what_comes_along_and_what_does_not(source: Path, tmp_path: Path) -> None:
    out = convert(
        str(source),
        tmp_path / "out",
        recipe=Recipe(Quantization(64, 4)),
        command=["m7mlx-convert", "a b", "--q-bits", "4"],
    )
    names = sorted(p.name for p in out.iterdir())
    assert names == [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    assert read(out)["license"] == "mit"
    assert "auto_map" not in read(out)
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "m7mlx-convert 'a b' --q-bits 4" in card
    # Scales and biases of 32 bits.
    assert "quantised (4 bits, groups of 64), 5.00 bits a weight" in card
    assert ModelConfig.from_folder(out).quantization == Quantization(64, 4)


def test_large_results_are_split_with_an_index(tmp_path: Path) -> None:
    tensors = {
        f"t{i}": mx.random.normal((10, i + 1)).astype([mx.float32, mx.bfloat16, mx.float16][i % 3]) for i in range(9)
    }
    tensors["empty"] = mx.zeros((0, 3))
    tensors["turned"] = mx.arange(12, dtype=mx.uint32).reshape(3, 4).T
    writer = WeightsWriter(tmp_path, [[Spec(k, v.dtype, v.shape)] for k, v in tensors.items()], max_bytes=400)
    for array in tensors.values():
        writer.write([TensorBytes.of(array)])
    writer.finish()
    writer.close()
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert len(set(index.values())) == 3
    assert same(arrays(tmp_path), tensors)
    assert {name: file for file in set(index.values()) for name in validate_header(tmp_path / file)} == index


def test_the_writer_keeps_to_its_plan(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path, [[Spec("a", mx.float32, (2,))], [Spec("b", mx.float32, (2,))]])
    with pytest.raises(RunError, match="planned"):
        writer.write([TensorBytes.of(mx.zeros(2)), TensorBytes.of(mx.zeros(2))])
    with pytest.raises(RunError, match="planned"):
        writer.write([TensorBytes.of(mx.zeros(3))])
    writer.write([TensorBytes.of(mx.zeros(2))])
    with pytest.raises(RunError, match="b was planned but not written"):
        writer.finish()
    writer.close()


def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    config = small_config(
        vocab_size=32000, hidden_size=512, intermediate_size=1024, n_layers=12, n_heads=8, head_dim=64
    )
    folder = write_folder(tmp_path / "source", config)
    total = (folder / "model.safetensors").stat().st_size
    largest = 32000 * 512 * 4
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    convert(str(folder), tmp_path / "out", recipe=Recipe(Quantization(64, 4)))
    peak = mx.get_peak_memory() - before
    assert total > 3 * largest
    assert peak < 2 * largest


# --- the command ------------------------------------------------------------------------------


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "m7mlx-convert"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def test_the_command_from_another_directory(source: Path, tmp_path: Path) -> None:
    done = run(source, "--q-bits", 4, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "source-4bit\n", "")
    assert load(tmp_path / "source-4bit")[0].config.quantization == Quantization(64, 4)
    assert (
        run("--hf-path", "source", "--quantize", "--q-group-size", 32, "--mlx-path", "other", cwd=tmp_path).stdout
        == "other\n"
    )
    assert read(tmp_path / "other")["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert run("source", cwd=tmp_path).stdout == "source-mlx\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one SOURCE"),
        (["a", "--hf-path", "b"], "not both"),
        (["a", "--q-bits", "7"], "invalid choice: 7"),
        (["a", "--q-bits", "4", "--q-group-size", "48"], "invalid choice: 48"),
        (["a", "--q-group-size", "64"], "--q-group-size needs --q-bits"),
        (["a", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["/no/such/folder"], "is no folder here"),
        (["SOURCE", "--mlx-path", "SOURCE"], "overlap"),
        (["SOURCE", "--mlx-path", "SOURCE/inside"], "overlap"),
        (["SOURCE", "--mlx-path", "SOURCE/config.json"], "is a file"),
        (["SOURCE", "--mlx-path", "/no/such/parent/out"], "does not exist"),
        (["SOURCE", "--q-bits", "4", "--q-group-size", "128"], "do not divide; use --q-group-size 32 or 64"),
        (["SOURCE/tokenizer.model"], "not a sound GGUF file"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_bad_usage_is_one_line_and_status_2(source: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = run(*[a.replace("SOURCE", str(source)) for a in arguments], cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("m7mlx-convert: error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [n for n in DAMAGE if n not in ("wrong shape", "architecture")])
def test_damaged_sources_leave_nothing(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "source", small_config(vocab_size=32000, n_layers=1))
    DAMAGE[name][0](folder)
    assert main([str(folder), "--mlx-path", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("m7mlx-convert: error: ")
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_existing_result_is_replaced_only_with_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    for _ in range(2):
        refused = run(source, "--mlx-path", out, "--force").stderr
        assert "is not a model folder that m7mlx-convert wrote and is not replaced" in refused
        assert (out / "precious").exists()
        (out / "config.json").write_text("{}")  # nor is what others have written
    own = tmp_path / "own"
    assert run(source, "--mlx-path", own).returncode == 0
    assert "--force to replace" in run(source, "--mlx-path", own).stderr
    before = (own / "SHA256SUMS").read_bytes()
    rewrite_with_nan(source)
    assert run(source, "--mlx-path", own, "--force").returncode == 2
    # A failed conversion does not cost the old one.
    assert (own / "SHA256SUMS").read_bytes() == before
    write_folder(source, CONFIG, random_weights(CONFIG, seed=9))
    assert run(source, "--mlx-path", own, "--force").returncode == 0
    assert (own / "SHA256SUMS").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "own", "source"]


def rewrite_with_nan(folder: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write_folder(folder, CONFIG, weights)


# --- broken off -------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    config = small_config(
        vocab_size=32000, hidden_size=512, intermediate_size=2048, n_layers=16, n_heads=8, head_dim=64
    )
    return write_folder(tmp_path / "large", config)


@pytest.fixture
def started(large: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A conversion that writes weights."""
    tool = Path(sys.executable).parent / "m7mlx-convert"
    command = [tool, large, "--mlx-path", tmp_path / "out", "--q-bits", "3"]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.partial-*/*.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cleans_up(started: subprocess.Popen[str], tmp_path: Path, number: int) -> None:
    started.send_signal(number)
    out, error = started.communicate(timeout=60)
    assert (started.returncode, out, error) == (130, "", "")
    assert [p.name for p in tmp_path.iterdir()] == ["large"]


def test_a_killed_run_leaves_no_result_and_the_next_one_cleans_up(
    started: subprocess.Popen[str],
    large: Path,
    tmp_path: Path,
) -> None:
    started.kill()
    started.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.partial-*"))
    (tmp_path / f".out.partial-{os.getpid()}").mkdir()  # of a process that lives: ours
    assert run(large, "--mlx-path", tmp_path / "out").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".out.partial-{os.getpid()}", "large", "out"]


def test_what_was_moved_aside_comes_back(source: Path, tmp_path: Path) -> None:
    """Killed between the two renames of --force: the old result is put back by the next run."""
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    aside = tmp_path / f".out.old-{dead.stdout.strip()}"
    aside.mkdir()
    (aside / "precious").write_text("x")
    rewrite_with_nan(source)
    assert run(source, "--mlx-path", tmp_path / "out").returncode == 2
    assert (tmp_path / "out" / "precious").exists()


def test_a_full_disk(large: Path, tmp_path: Path) -> None:
    """A file that may not grow past a few megabytes, as on a disk that fills in the middle."""
    code = (
        "import resource, signal, sys\nfrom m7mlx_convert.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(large), "--mlx-path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "m7mlx-convert: error: a file is too big\n"
    assert [p.name for p in tmp_path.iterdir()] == ["large"]


def test_a_disk_without_room_is_noticed_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("m7mlx_convert.output.shutil.disk_usage", lambda _: usage)
    with pytest.raises(M7Error, match=r"0\.0 GB free"):
        convert(str(source), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
