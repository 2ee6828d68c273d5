"""Where files lie: the user's cache, and paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where this project keeps its own files: $M7MLX_CACHE, or the user's cache directory."""
    import platformdirs  # a few milliseconds, which most starts save

    return Path(os.environ.get("M7MLX_CACHE") or platformdirs.user_cache_dir("m7mlx"))


def user_path(name: str | Path) -> Path:
    """A path as users write it, with ~ for a home; one that names nobody's home stays as it is."""
    return Path(os.path.expanduser(name))
