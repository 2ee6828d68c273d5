"""The engines by name, and whether they are installed.

Nothing is imported before its engine is asked for: m7mlx brings a BLAS into its process, which MLX
is to have, in mlx-lm's runs too, and torch is not.
"""

from __future__ import annotations

import importlib.util

from m7mlx_bench.engine import Engine
from m7mlx_bench.ours import M7, M7Compiled, M7EightBits, M7FourBits
from m7mlx_bench.peers import LlamaCpp, MlxLm, MlxLmRotating, Transformers, TransformersHalf

ENGINES: dict[str, type[Engine]] = {
    "m7mlx": M7,
    "m7mlx compiled": M7Compiled,
    "m7mlx kv8": M7EightBits,
    "m7mlx kv4": M7FourBits,
    "mlx-lm": MlxLm,
    "mlx-lm rotating": MlxLmRotating,
    "transformers": Transformers,
    "transformers bf16": TransformersHalf,
    "llama.cpp": LlamaCpp,
}
_NEEDS = {  # the start of an engine's name: what it imports, and what pip calls that
    "mlx-lm": ("mlx_lm", "mlx-lm"),
    "transformers": ("torch", "torch transformers"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
}


DEFAULT = ("m7mlx", "mlx-lm", "mlx-lm rotating", "transformers", "transformers bf16", "llama.cpp")


def is_available(name: str) -> bool:
    """Return whether the packages of an engine are installed."""
    return importlib.util.find_spec(_needs(name)[0]) is not None


def needed_packages(name: str) -> str:
    """Return what `pip install` has to bring for an engine."""
    return _needs(name)[1]


def _needs(name: str) -> tuple[str, str]:
    return next((needed for start, needed in _NEEDS.items() if name.startswith(start)), ("m7mlx", "m7mlx"))
