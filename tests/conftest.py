"""What several test files share: small models, the real Mistral tokenizers, the demo model."""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before anybody imports mlx.core

# isort: split
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mistral_common
import mlx.core as mx
import needs
import numpy as np
import processes
import pytest
from mlx.utils import tree_flatten

from m7mlx import blas
from m7mlx.config import ModelConfig
from m7mlx.hub import resolve
from m7mlx.load import build
from m7mlx.model import Mistral
from m7mlx.tokenizer import Tokenizer, load_tokenizer

MISTRAL_FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
}


def pytest_configure() -> None:
    processes.take_signals()
    if not blas.library:  # the advice to install one is not what tests of a program's lines are about
        os.environ["M7MLX_BLAS"] = "off"


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs.skip_without(item.iter_markers())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if told := needs.summary(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(told)


def small_config(**changes: Any) -> ModelConfig:
    """A Mistral of a few thousand parameters; the window is much shorter than the tests' sequences."""
    values: dict[str, Any] = {
        "model_type": "mistral",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 4096,
        "sliding_window": 7,
        "tie_word_embeddings": False,
    }
    return ModelConfig(**values | changes)


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights large enough that every part of the model shows in the logits."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in config.weight_shapes().items():
        scale = 1.0 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1])
        weights[name] = (rng.standard_normal(shape) * scale + (len(shape) == 1)).astype(np.float32)
    return weights


def small_model(config: ModelConfig, seed: int = 0) -> Mistral:
    return build(config, {name: mx.array(array) for name, array in random_weights(config, seed).items()})


def weights_on_disk(model: Mistral) -> dict[str, np.ndarray]:
    """The unquantised weights of a loaded model by their names on disk: `m7mlx.fuse` undone."""
    loaded = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    found: dict[str, np.ndarray] = {}
    taken: dict[str, int] = {}
    for name, shape in model.config.weight_shapes().items():
        fused = re.sub("[qkv]_proj", "qkv_proj", re.sub("(gate|up)_proj", "gate_up_proj", name))
        fused = fused if fused in loaded else name
        start = taken.get(fused, 0)
        taken[fused] = start + shape[0]
        found[name] = loaded[fused][start : taken[fused]]
    assert taken == {name: array.shape[0] for name, array in loaded.items()}
    return found


def write_folder(folder: Path, config: ModelConfig, weights: dict[str, np.ndarray] | None = None) -> Path:
    """A whole model folder: config, weights and the v1 or v3 tokenizer, whichever the vocabulary fits."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    arrays = {name: mx.array(array) for name, array in (weights or random_weights(config)).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    version = "v3" if config.vocab_size >= 32768 else "v1"
    shutil.copy(mistral_file(version), folder / "tokenizer.model")
    return folder


def mistral_file(version: str) -> Path:
    return Path(mistral_common.__file__).parent / "data" / MISTRAL_FILES[version]


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


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test touches the conversations and the configuration of whoever runs it, nor talks to the real Hub: the
    tests' own server takes its place where one is needed."""
    monkeypatch.setenv("M7MLX_DATA", str(tmp_path_factory.mktemp("data")))
    monkeypatch.setenv("M7MLX_CONFIG", str(tmp_path_factory.mktemp("config")))
    if "HF_ENDPOINT" not in os.environ:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def nothing_unforeseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The chat outlives its own faults and logs them; a test does not, unless it looks at them and clears the log."""
    yield
    faults = [record for record in caplog.get_records("call") if record.name.startswith("m7mlx")]
    for record in faults:
        if record.exc_info and record.exc_info[1]:
            raise record.exc_info[1]
    assert not faults


_nothing_unforeseen = pytest.fixture(autouse=True)(nothing_unforeseen)
