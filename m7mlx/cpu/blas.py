"""A fast BLAS for Linux's CPU backend, in place of the one that MLX brings.

The wheel mlx-cpu is linked against Netlib's reference BLAS, whose `cblas_sgemm` does 2 GFLOP/s
where OpenBLAS does 80. Where kernels of ours are usable (`m7mlx.cpu.native`), a model's products do
not go through it, and it is left for what other operations of MLX compute, calibration for one.

The dynamic linker looks a symbol up in the program's global scope first, so a library that is
loaded there before mlx.core is imported is the one that MLX calls. That is why this module acts
when it is imported, and reads its setting itself. macOS (Accelerate, Metal) and CUDA are left
alone.

M7MLX_BLAS   "off" leaves MLX's own; otherwise the name or path of a library to use
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

from m7mlx.cpu.backend import is_linux_cpu
from m7mlx.paths import cache_dir

_KNOWN = ("libopenblas.so.0", "libopenblas.so", "libblis.so.4")
_ADVICE = "on Debian and Ubuntu: apt install libopenblas0-pthread; on Fedora: dnf install openblas-threads"

library = ""  # the one that MLX calls, if `interpose` found one


def interpose() -> None:
    """Load a fast BLAS for mlx.core to call, if one is wanted and found; warn if it is too late."""
    global library
    chosen = _setting()
    if library or chosen == "off" or not is_linux_cpu():
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


def note(advise: bool = True) -> str:
    """Return a line if the library asked for cannot be used or, once, on how to get one.

    advise  whether one would help: not where our own kernels compute
    """
    chosen = _setting()
    if library or chosen == "off" or not is_linux_cpu():
        return ""
    if chosen:
        return f"M7MLX_BLAS: {chosen} cannot be loaded, or has no cblas_sgemm; MLX's own is used"
    if not advise:
        return ""
    told = cache_dir() / "blas-told"
    try:
        told.parent.mkdir(parents=True, exist_ok=True)
        told.touch(exist_ok=False)
    except OSError:  # told before, or nowhere to remember it
        return ""
    return f"without OpenBLAS this machine reads prompts at a tenth of its speed or less; {_ADVICE}"


def _setting() -> str:
    chosen = os.environ.get("M7MLX_BLAS", "")
    return "off" if chosen.lower() == "off" else chosen


interpose()  # on import, because the package imports mlx.core next
