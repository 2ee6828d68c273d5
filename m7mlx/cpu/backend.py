"""Whether MLX computes with its CPU backend on Linux: what `m7mlx.cpu` is for."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version


def is_linux_cpu() -> bool:
    """Tell whether MLX's CPU library is installed, on Linux: not on macOS, not with CUDA's."""
    if sys.platform != "linux":
        return False
    try:
        version("mlx-cpu")
    except PackageNotFoundError:
        return False
    return True
