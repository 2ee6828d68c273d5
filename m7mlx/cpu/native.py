"""Whether the C++ kernels of Linux's CPU backend can be used here and, if not, why.

They are built while the package is installed, where there is a compiler (hatch_build.py). Whatever
keeps them from being used, MLX's own kernels take their place: the results are the same, later. No
other system has them or needs them. Before m7mlx.cpu._native is imported, ask `usable`.

M7MLX_NATIVE      "off" leaves everything to MLX; with "require", it is an error if they are not
                  usable
M7MLX_ISA         whose kernels run: an instruction set; else the best that this processor has
M7MLX_INPUT_BITS  bits of the numbers that meet packed weights: 16, where few tokens meet codes of
                  2, 4 or 8 bits (the default), or always 32
"""

from __future__ import annotations

import json
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import mlx.core as mx

from m7mlx.cpu.backend import is_linux_cpu
from m7mlx.cpu.cores import count_cores
from m7mlx.errors import InputError
from m7mlx.paths import cache_dir

_RECORD = Path(__file__).with_name("_build.json")  # what hatch_build.py says of them
_OFF = "M7MLX_NATIVE=off"
_AGAIN = "install m7mlx again"


class _Kernels(NamedTuple):
    """What there is: an instruction set and the extension, or a reason."""

    instruction_set: str
    why_not: str
    extension: ModuleType | None = None


def usable() -> bool:
    """Tell whether the kernels can be used; InputError if the environment asks for what is not."""
    return _find().extension is not None


def kernels() -> ModuleType:
    """Return the extension; only where the kernels are usable."""
    extension = _find().extension
    assert extension is not None
    return extension


def instruction_set() -> str:
    """Return the name of the set whose kernels run; "" if none do."""
    return _find().instruction_set


@cache
def rounds_inputs() -> bool:
    """Tell whether the kernels may round what meets packed weights to 16 bits.

    Raises InputError if the environment asks for something else.
    """
    bits = os.environ.get("M7MLX_INPUT_BITS", "16")
    if bits not in ("16", "32"):
        raise InputError(f"M7MLX_INPUT_BITS: {bits!r:.40} is neither 16 nor 32")
    return bits == "16"


def why_not() -> str:
    """Return why the kernels cannot be used, in a line; "" if they can, or need not."""
    return _find().why_not


def note() -> str:
    """Return a line on why the kernels are missing here: once for each reason on a machine."""
    reason = why_not()
    if not reason or reason == _OFF:
        return ""
    told = cache_dir() / "native-told"
    try:
        told.parent.mkdir(parents=True, exist_ok=True)
        if told.exists() and told.read_text(encoding="utf-8") == reason:
            return ""
        told.write_text(reason, encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # nowhere to remember it
        return ""
    return f"packed weights are computed without m7mlx's kernels, at a fraction of the speed: {reason}"


@cache
def _find() -> _Kernels:
    """Load and try the kernels; once, because what it finds does not change."""
    setting, wanted = os.environ.get("M7MLX_NATIVE", "").lower(), os.environ.get("M7MLX_ISA", "")
    if setting not in ("", "off", "require"):
        raise InputError(f"M7MLX_NATIVE: {setting!r} is neither off nor require")
    if not is_linux_cpu():
        return _Kernels("", "")
    found = _Kernels("", _OFF) if setting == "off" else _try(wanted)
    if setting == "require" and found.why_not:
        raise InputError(f"M7MLX_NATIVE=require: {found.why_not}")
    return found


def _try(wanted: str) -> _Kernels:
    built_for, missing = _read_record()
    if missing:
        return _Kernels("", f"they were not built when m7mlx was installed: {missing}")
    if built_for != (installed := version("mlx")):  # a version's classes are compiled into both
        mend = f'pip install "mlx[cpu]=={built_for}"'
        return _Kernels("", f"they were built for MLX {built_for}, and {installed} is installed; {mend}")
    try:
        from m7mlx.cpu import _native  # not everywhere; after mlx.core, whose library it needs
    except ImportError as error:
        return _Kernels("", f"they cannot be loaded ({error}); {_AGAIN}")
    there = _native.instruction_sets()
    chosen = wanted or there[-1]
    if chosen not in there:
        raise InputError(f"M7MLX_ISA: {chosen!r} is not to be had here; there are {', '.join(there)}")
    _native.use_instruction_set(chosen)
    try:
        x = mx.array([[1.0, 2.0, 3.0]])
        passed = mx.array_equal(_native.product(x, [_native.Weight(mx.eye(3))]), x).item()
    except Exception as error:  # whatever a binary that does not fit raises
        return _Kernels("", f"they fail ({error}); {_AGAIN}")
    if not passed:
        return _Kernels("", f"they compute something else than MLX; {_AGAIN}")
    _native.set_threads(count_cores())
    return _Kernels(chosen, "", _native)


def _read_record() -> tuple[str, str]:
    """Return for which MLX they were built, or why they were not."""
    try:
        record = json.loads(_RECORD.read_text(encoding="utf-8"))
        return str(record.get("mlx", "")), str(record.get("missing", ""))
    except (OSError, ValueError, AttributeError):
        return "", f"nobody has built them; {_AGAIN}"
