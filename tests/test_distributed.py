"""Several processes share a model: real ones, on this machine, started by `mlx.launch` with its ring of sockets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_config, write_folder
from ranks import passes

from m7mlx.load import load_model

LAUNCH = shutil.which("mlx.launch", path=str(Path(sys.executable).parent)) or "mlx.launch"
PORTS = iter(range(24_000 + os.getpid() % 400 * 16, 32_000, 8))


def launch(count: int, *command: str, **options: Any) -> subprocess.Popen[str]:
    ring = ["-n", str(count), "--backend", "ring", "--starting-port", str(next(PORTS))]
    env = ["--env", "OPENBLAS_NUM_THREADS=1"]
    return subprocess.Popen(
        [LAUNCH, *ring, *env, "--", sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def launched(count: int, *command: str) -> tuple[str, str]:
    process = launch(count, *command)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config(n_heads=8, n_kv_heads=4, head_dim=16, intermediate_size=128, n_layers=5, vocab_size=32000)
    return write_folder(tmp_path_factory.mktemp("ranks") / "model", config)


RANKS = str(Path(__file__).parent / "ranks.py")


@pytest.mark.parametrize("count", [2, 4])
def test_logits_are_those_of_one_process(folder: Path, tmp_path: Path, count: int) -> None:
    """Chunks, tokens across the wrap, a rollback, rows of a batch; and nobody holds what is not its own."""
    _, err = launched(count, RANKS, str(folder), str(tmp_path), "tensor,pipeline")
    whole = load_model(folder)
    expected = passes(whole)
    for mode in ("tensor", "pipeline"):
        ranks = [dict(np.load(tmp_path / f"{mode}-{r}.npz")) for r in range(count)]
        for found in ranks:
            for name, logits in expected.items():
                scale = np.abs(logits).max()
                assert np.abs(found[name] - logits).max() <= 2e-6 * scale, (mode, name, err)
        heads, layers = whole.config.n_kv_heads, whole.config.n_layers
        shapes = [tuple(found["shape"]) for found in ranks]
        if mode == "tensor":
            assert shapes == [(heads // count, layers)] * count
        else:
            assert sum(n for _, n in shapes) == layers and {h for h, _ in shapes} == {heads}
        ends = 2 * whole.config.vocab_size * whole.config.hidden_size * 4
        assert sum(int(found["bytes"]) for found in ranks) < whole.nbytes + (count - 1) * (ends + 10_000)
