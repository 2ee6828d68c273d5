"""What MLX's operations compute, as on a Mac: the rolling cache, and the demo model's text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from effort import examples
from values import number

from m7mlx import load
from m7mlx.cpu import native

pytestmark = pytest.mark.timeout(1200)  # what runs first is compiled, or computed without a BLAS

HERE = Path(__file__).parent


@pytest.mark.skipif(not native.usable(), reason="there are no kernels, so those tests ran without them")
def test_the_rolling_cache_is_exact_with_mlx_as_well() -> None:
    """Run its tests in another process: a state machine has no parameters in pytest."""
    files = [str(HERE / "test_cache.py"), str(HERE / "test_cache_machine.py")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not memory and not takes_little",
        *files,
    ]
    done = subprocess.run(
        command, env=os.environ | {"M7MLX_NATIVE": "off"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif(not native.usable(), reason="there are no kernels to compare with")
@pytest.mark.demo
def test_the_demo_model_says_the_same_packed_and_expanded(demo_model: Path, request: pytest.FixtureRequest) -> None:
    def tokens() -> list[int]:
        model, tokenizer = load(demo_model)
        cache = model.new_cache(kv_bits=32)  # as computed, as the expanded model's
        logits = model(mx.array([tokenizer.encode("Once upon a time there was")]), cache)
        found = []
        for _ in range(examples(50)):  # the end of a text is a token as any other
            found.append(int(number(logits[0, -1].argmax())))
            logits = model(mx.array([found[-1:]]), cache)
        return found

    packed = tokens()
    request.getfixturevalue("without_kernels")
    assert tokens() == packed
