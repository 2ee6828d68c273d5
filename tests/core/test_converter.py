"""GGUF straight into `load`: converted once for each state of the file, whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from gguf_files import write_mistral_gguf
from m7mlx_convert.convert import convert
from models import small_config
from processes import running

from m7mlx import load
from m7mlx.errors import InputError, WeightsError
from m7mlx.files import converter
from m7mlx.files.hub import find_local, resolve

CONFIG = small_config(vocab_size=32000, n_layers=1)
IDS = mx.array([[1, 5, 900, 31999, 7]])
LOAD = "import sys; from m7mlx import load; load(sys.argv[1])"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def names(folder: Path) -> list[str]:
    """What lies in the cache folder, without the random parts."""
    return sorted(path.name.split("-")[0] if path.is_dir() else path.suffix for path in folder.iterdir())


def test_a_gguf_file_is_loaded_and_converted_once(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.gguf"
    write_mistral_gguf(file, CONFIG)
    expected = load(convert(str(file), tmp_path / "out"))[0](IDS)
    model, tokenizer = load(file)
    assert mx.array_equal(model(IDS), expected).item()
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    assert capfd.readouterr().err.count("Converting") == 1
    assert mx.array_equal(load(str(file))[0](IDS), expected).item()
    assert "Converting" not in capfd.readouterr().err
    assert names(cache) == [".lock", "tiny"]


def test_a_file_that_has_changed_is_converted_anew(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_mistral_gguf(file, CONFIG)
    load(file)
    before = set(cache.iterdir())
    (cache / f".{next(p.name for p in before if p.is_dir())}.partial-999999").mkdir()  # of a run that was killed
    write_mistral_gguf(file, small_config(vocab_size=32000, n_layers=2))
    assert load(file)[0].config.n_layers == 2
    assert names(cache) == [".lock", "tiny"]
    assert {path for path in before if path.is_dir()}.isdisjoint(cache.iterdir())


def test_two_processes_convert_once(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_mistral_gguf(file, CONFIG)
    pipe = subprocess.PIPE
    with (
        running([sys.executable, "-c", LOAD, file], stderr=pipe, text=True) as first,
        running([sys.executable, "-c", LOAD, file], stderr=pipe, text=True) as second,
    ):
        told = [process.communicate(timeout=120)[1] for process in (first, second)]
        assert (first.returncode, second.returncode) == (0, 0), told
    assert sum("Converting" in text for text in told) == 1
    assert names(cache) == [".lock", "tiny"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path, cache: Path, number: int) -> None:
    """What it has started holds the lock until it has ended."""
    file = tmp_path / "tiny.gguf"
    write_mistral_gguf(file, CONFIG)
    with running([sys.executable, "-c", LOAD, file], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "Converting" in process.stderr.readline()
        os.kill(process.pid, number)
        process.wait(60)
        assert load(file)[0].config.n_layers == 1
    assert names(cache) == [".lock", "tiny"]


def test_what_the_converter_refuses_is_one_error(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(WeightsError, match=r"model\.gguf could not be converted: .*GGUF"):
        load(tmp_path / "model.gguf")
    assert names(cache) == [".lock"]
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(InputError, match="is a file, but not GGUF"):
        load(tmp_path / "text.gguf")


def test_notes_of_the_converter_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A converter that tells a note, in a process as the real one is."""
    program = tmp_path / "m7mlx_convert.py"
    program.write_text(
        "from m7mlx.terminal import print_event\nprint_event('note', text='Q5_K is\\n\\x1b[2J expanded')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with converter.locked(tmp_path / "lock") as lock:
        converter.run_converter(tmp_path / "x.gguf", tmp_path / "out", lock)
    assert capfd.readouterr().err == "note: Q5_K is ␛[2J expanded\n"


@pytest.mark.parametrize("lost", ["config.json", "*.safetensors"])
def test_a_result_that_has_lost_files_is_made_anew(tmp_path: Path, cache: Path, lost: str) -> None:
    """Something that tidies caches has removed them."""
    file = tmp_path / "tiny.gguf"
    write_mistral_gguf(file, CONFIG)
    expected = load(file)[0](IDS)
    for path in [*cache.glob(f"tiny-*/{lost}")]:
        path.unlink()
    assert mx.array_equal(load(file)[0](IDS), expected).item()
    assert names(cache) == [".lock", "tiny"]


def test_a_new_revision_on_the_hub_removes_the_result_of_the_earlier_one(tmp_path: Path, cache: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    for revision, layers in (("aaa", 1), ("bbb", 2)):
        write_mistral_gguf(repo / "blobs" / revision, small_config(vocab_size=32000, n_layers=layers))
        (repo / "snapshots" / revision).mkdir(parents=True)
        (repo / "snapshots" / revision / "tiny.gguf").symlink_to(f"../../blobs/{revision}")
        assert load(repo / "snapshots" / revision / "tiny.gguf")[0].config.n_layers == layers
        assert names(cache) == [".lock", "tiny"]


def test_a_result_is_found_and_progress_is_told(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file, and of one in the Hub's cache."""
    file = tmp_path / "tiny.gguf"
    write_mistral_gguf(file, CONFIG)
    assert find_local(file) == file
    seen: list[tuple[int, int]] = []
    folder = resolve(file, progress=lambda *counts: seen.append(counts))
    assert folder.parent == cache
    assert seen[-1][0] == seen[-1][1] > 0
    assert find_local(file) == folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_local("org/name/tiny.gguf") is None
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    file.rename(snapshot / "tiny.gguf")
    assert find_local("org/name/tiny.gguf") is None
    folder = resolve(snapshot / "tiny.gguf")
    assert find_local("org/name/tiny.gguf") == folder
