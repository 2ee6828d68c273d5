"""The start of this process: alone, or as one of several."""

from __future__ import annotations

import os


def is_launched() -> bool:
    """Return whether this process was started as one of several: by `mlx.launch`, or by mpirun."""
    return any(name in os.environ for name in ("MLX_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
