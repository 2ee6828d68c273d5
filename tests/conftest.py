"""What pytest does around every test, and the fixtures that several test files share."""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before anybody imports mlx.core

# isort: split
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import needs
import processes
import pytest
from models import MISTRAL_FILES, mistral_file, small_config, write_folder
from peers import silenced
from unforeseen import nothing_unforeseen

from m7mlx.cpu import blas, native
from m7mlx.files.hub import resolve
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer


def pytest_configure() -> None:
    processes.take_signals()
    for name in ("COLUMNS", "LINES"):  # pytest-xdist's, which programs would believe more than their terminal
        os.environ.pop(name, None)
    if not blas.library:  # advice on what to install is not what tests of a program's lines are about
        os.environ["M7MLX_BLAS"] = "off"
    if not native.usable():
        os.environ["M7MLX_NATIVE"] = "off"


@pytest.fixture(scope="module", params=["kernels", "MLX"])
def computed_by(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module's tests with our kernels and again with MLX's operations, as on a Mac."""
    if request.param == "kernels":
        if not native.usable():
            pytest.skip("there are no kernels here")
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        without(patch)
        yield
    native._find.cache_clear()


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let MLX's operations compute, as where no kernels are built."""
    without(monkeypatch)
    yield
    monkeypatch.undo()
    native._find.cache_clear()


@pytest.fixture(scope="module", params=["base", "avx2", "avx512"])
def forced_instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module's tests with the kernels of each instruction set that this processor has."""
    if not native.usable():
        pytest.skip("there are no kernels here")
    kernels = native.kernels()
    if request.param not in kernels.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    kernels.use_instruction_set(request.param)
    yield
    kernels.use_instruction_set(native.instruction_set())


def without(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("M7MLX_NATIVE", "off")
    native._find.cache_clear()
    assert not native.usable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs.skip_without(item.iter_markers())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if told := needs.summary(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(told)


@pytest.fixture(scope="session")
def mistral_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """The real tokenizers v1, v2 and v3, as a model folder would hold them."""
    loaded = {}
    for version in MISTRAL_FILES:
        folder = tmp_path_factory.mktemp(version)
        shutil.copy(mistral_file(version), folder / f"tokenizer.model.{version}")
        loaded[version] = load_tokenizer(folder)
    return loaded


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with Mistral's v3 vocabulary and a window of 16."""
    config = small_config(vocab_size=32768, sliding_window=16, n_layers=2)
    return write_folder(tmp_path_factory.mktemp("model") / "small", config)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's folder, fetched (93 MB, once) into the user's cache."""
    return resolve("demo")


@pytest.fixture(scope="session")
def mlx_lm() -> ModuleType:
    with silenced():
        import mlx_lm

        return mlx_lm


@pytest.fixture(autouse=True, scope="session")
def _prefixes_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the conversations of all servers that tests start out of their user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M7MLX_PREFIXES", str(tmp_path_factory.mktemp("prefixes")))
        yield


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tests away from their user's conversations and configuration, and from the real Hub.

    The tests' own server takes the Hub's place where one is needed.
    """
    monkeypatch.setenv("M7MLX_DATA", str(tmp_path_factory.mktemp("data")))
    monkeypatch.setenv("M7MLX_CONFIG", str(tmp_path_factory.mktemp("config")))
    if "HF_ENDPOINT" not in os.environ:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


_nothing_unforeseen = pytest.fixture(autouse=True)(nothing_unforeseen)
