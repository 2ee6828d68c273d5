"""The tests of the rolling cache again, with MLX's operations, as on a Mac.

They are a state machine, for which pytest knows no parameters; so they run in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from m7mlx.cpu import native

HERE = Path(__file__).parent


@pytest.mark.skipif(not native.usable(), reason="there are no kernels, so those tests ran without them")
def test_the_rolling_cache_is_exact_with_mlx_as_well() -> None:
    files = [str(HERE / "test_cache.py"), str(HERE / "test_cache_machine.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, env=os.environ | {"M7MLX_NATIVE": "off"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
