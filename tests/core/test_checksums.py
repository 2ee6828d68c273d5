"""The manifest beside the weights, and what is remembered of files that were checked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from m7mlx_convert.convert import convert
from models import small_config, write_folder

from m7mlx import load
from m7mlx.errors import WeightsError
from m7mlx.files import checksums
from m7mlx.files.checksums import MANIFEST, check_folder, matches, sha256


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converted model, and a cache of the test's own."""
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "cache"))
    source = write_folder(tmp_path / "source", small_config(vocab_size=32000))
    return convert(str(source), tmp_path / "model")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last number's exponent: still finite
    path.write_bytes(data)


def test_one_flipped_bit_is_noticed(folder: Path, tmp_path: Path) -> None:
    assert load(folder)
    flip_a_bit(folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged: its SHA-256 is not the one in"):
        load(folder)
    with pytest.raises(WeightsError, match="is damaged"):
        convert(str(folder), tmp_path / "out")


def test_a_file_is_read_once_for_each_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(folder)
    read: list[Path] = []

    def noted(path: Path) -> str:
        read.append(path)
        return sha256(path)

    monkeypatch.setattr(checksums, "sha256", noted)
    check_folder(folder)
    assert not read
    os.utime(folder / "model.safetensors", ns=(1, 1))
    check_folder(folder)
    assert read == [folder / "model.safetensors"]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("nonsense\n", "is no checksum and file name"),
        (f"{'0' * 64}  ../config.json\n", "is no checksum and file name"),
        (f"{'0' * 64}  ..\n", "is no checksum and file name"),
        (f"{'0' * 64}  model-2.safetensors\n", "lacks model-2.safetensors"),
        (f"{'0' * 64} *model.safetensors\n", "is damaged"),
    ],
)
def test_manifests(folder: Path, manifest: str, message: str) -> None:
    (folder / MANIFEST).write_text(manifest)
    with pytest.raises(WeightsError, match=message):
        check_folder(folder)


def test_without_a_manifest_nothing_is_checked(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    flip_a_bit(folder / "model.safetensors")
    check_folder(folder)


def test_where_nothing_can_be_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "file"))  # no folder can be made there
    check_folder(folder)
    check_folder(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}'])
def test_a_damaged_record_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path))
    (tmp_path / "verified.json").write_text(content)
    (tmp_path / "a").write_text("a")
    assert matches(tmp_path / "a", sha256(tmp_path / "a"))
    assert list(json.loads((tmp_path / "verified.json").read_text())) == [str(tmp_path / "a")]
