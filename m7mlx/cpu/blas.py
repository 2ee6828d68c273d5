"""Linux's CPU backend: a fast BLAS in the place of the one that MLX brings.

The wheel mlx-cpu is linked against Netlib's reference BLAS, whose `cblas_sgemm` does 2 GFLOP/s where OpenBLAS does
80. The dynamic linker looks a symbol up in the program's global scope first, so a library that is loaded there before
mlx.core is imported is the one that MLX calls. macOS (Accelerate, Metal) and CUDA are left alone.

M7MLX_BLAS   "off": leave MLX's; or the name or path of a library to take
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

from m7mlx.paths import cache_dir

_KNOWN = ("libopenblas.so.0", "libopenblas.so", "libblis.so.4")
_ADVICE = "on Debian and Ubuntu: apt install libopenblas0-pthread; on Fedora: dnf install openblas-threads"

library = ""  # the one that was put in


def interpose() -> None:
    """Load a fast BLAS for mlx.core to call, where one is wanted and found; warns where it is too late."""
    global library
    chosen = os.environ.get("M7MLX_BLAS", "")
    if not _wanted() or chosen.lower() == "off" or library:
        return
    for name in (chosen,) if chosen else _KNOWN:
        try:
            found = hasattr(ctypes.CDLL(name), "cblas_sgemm")  # some builds give their symbols other names
        except OSError:
            continue
        if found and "mlx.core" not in sys.modules:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        elif found and not hasattr(ctypes.CDLL(None), "openblas_get_config"):  # nor by LD_PRELOAD
            warnings.warn(
                "mlx.core was imported before m7mlx and keeps its slow BLAS; import m7mlx first", stacklevel=2
            )
            return
        if found:
            library = name
            return


def note() -> str:
    """What the user should know, in a line: the library asked for cannot be used; or, once, how to get one."""
    chosen = os.environ.get("M7MLX_BLAS", "")
    if library or not _wanted() or chosen.lower() == "off":
        return ""
    if chosen:
        return f"M7MLX_BLAS: {chosen} cannot be loaded, or has no cblas_sgemm; MLX's own is used"
    told = cache_dir() / "blas-told"
    try:
        told.parent.mkdir(parents=True, exist_ok=True)
        told.touch(exist_ok=False)
    except OSError:  # told before, or nowhere to remember it
        return ""
    return f"without OpenBLAS this machine reads prompts at a tenth of its speed or less; {_ADVICE}"


def _wanted() -> bool:
    if sys.platform != "linux":
        return False
    try:
        version("mlx-cpu")
    except PackageNotFoundError:
        return False
    return True


interpose()  # on import, because the package imports mlx.core next
