"""Memory: how much this machine has, how much may be taken, and what a model takes of it.

A model takes its weights, the keys and values that it sees, and what is around them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from m7mlx.arrays import has_kernels, on_cpu
from m7mlx.config import ModelConfig
from m7mlx.errors import InputError
from m7mlx.units import in_gigabytes

_NO_END = 1 << 40  # positions
_UNBOUNDED = 4096  # tokens to plan for where no window bounds them
# Python, MLX, the tokenizer and the layers' activations, as measured (docs/performance.md).
AROUND = 150_000_000
_FREED = 1 << 26  # bytes of freed buffers that MLX may keep; more is no faster
_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD

UNDO_SLACK = 64  # tokens of a cache that a stop text, a draft or a broken-off answer may have undone

_limit: int | None = None  # set by `limit_memory`


def machine_memory() -> int:
    """Return the bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def budget() -> int:
    """Return the bytes that this process may take: the limit, or all that the machine has."""
    return machine_memory() if _limit is None else _limit


def limit_memory(nbytes: int) -> None:
    """Let this process take so many bytes: no model is loaded and no sequence grows beyond them.

    Raises InputError for more than the machine has, or less than any model needs.
    """
    global _limit
    if not AROUND < nbytes <= machine_memory():
        raise InputError(
            f"the limit on memory must be between {in_gigabytes(AROUND, 2)} and this machine's "
            f"{in_gigabytes(machine_memory())}, not {in_gigabytes(nbytes, 2)}"
        )
    _limit = nbytes


def settle() -> None:
    """Tell MLX, once a model is loaded, how much freed memory to keep; by default it keeps all.

    MLX's wired limit stays what it is, 0: wired memory that runs out stops the machine, not the
    program.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc raises this up to 32 MB by itself; a growing cache leaves holes of that size.
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
    mx.set_memory_limit(budget())
    mx.set_cache_limit(min(_FREED, budget() // 16))


def expands(config: ModelConfig) -> bool:
    """Return whether loading expands quantised weights.

    Without kernels of ours it does on a CPU, if half the budget suffices.
    """
    return on_cpu() and not has_kernels() and config.n_weights * 4 <= budget() // 2


def loaded_bytes(config: ModelConfig, stored: int) -> int:
    """Return the bytes of weights in memory, of `stored` bytes in files.

    On a CPU without kernels of ours they are in float32, or their scales are.
    """
    if not on_cpu() or has_kernels():
        return stored
    if expands(config) or stored * 8 > config.n_weights * 12:  # not quantised
        return config.n_weights * 4
    return stored + config.n_weights // 64 * 4  # two numbers for a group, in 16 bits more


def cache_bytes(config: ModelConfig, positions: int, bits: float = 16) -> int:
    """Return the bytes of keys and values, of so many bits a number.

    They are 2 · KV heads · head_dim numbers for each position and layer. Where a part of the layers
    has a window, those keep no more than that and `UNDO_SLACK`.
    """
    return int(2 * config.n_kv_heads * config.head_dim * bits / 8 * _kept(config, positions))


def _kept(config: ModelConfig, positions: int) -> int:
    """Return the positions that all layers keep together."""
    if not config.layer_types:
        return config.n_layers * positions
    return sum(positions if w is None else min(positions, w + UNDO_SLACK) for w in config.windows)


def default_kv_bits(config: ModelConfig, stored: int) -> int:
    """Return the bits of keys and values in a cache that is not told otherwise.

    They are 16, but 32 for files in float32, and on a CPU without kernels of ours.

    stored  bytes of the weights in files
    """
    if on_cpu() and not has_kernels():
        return 32
    return 16 if stored < config.n_weights * 3 else 32


def positions_that_fit(config: ModelConfig, weights: int, bits: float) -> int:
    """Return how many positions fit into the budget.

    weights  bytes that are taken already
    bits     of each number of keys and values
    """
    free = max(0, budget() - weights - AROUND)
    fit = free // cache_bytes(config, 1, bits)
    if not config.layer_types or config.sliding_window is None:
        return fit
    filled = config.sliding_window + UNDO_SLACK
    if fit < filled:
        return fit
    # From there on the layers without a window grow alone.
    growing = cache_bytes(config, filled + 1, bits) - cache_bytes(config, filled, bits)
    return filled + (free - cache_bytes(config, filled, bits)) // growing if growing else _NO_END


def planned_length(config: ModelConfig) -> int:
    """Return the tokens that memory is planned for: the window, or 4,096 where there is none."""
    return config.window or min(_UNBOUNDED, config.max_position_embeddings)


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory that a model with one conversation takes on this machine.

    tokens     of the conversation
    is_window  whether `tokens` is the window: then no conversation takes more
    weights    as loaded
    caches     keys and values, by their bits: as computed first, then in 4 bits
    other      the program, and what computing a prompt takes
    """

    tokens: int
    is_window: bool
    weights: int
    caches: Mapping[str, int]
    other: int

    @property
    def total(self) -> int:
        """All of it, with keys and values as computed."""
        return self.weights + next(iter(self.caches.values())) + self.other

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "tokens": self.tokens,
            "is_window": self.is_window,
            "weights_bytes": self.weights,
            "cache_bytes": dict(self.caches),
            "other_bytes": self.other,
        }


def footprints(config: ModelConfig, stored: int, slack: int) -> list[Footprint]:
    """Return what a model takes: at its window, or at 4,096 tokens and at its whole context.

    stored  bytes of its weights in files
    slack   positions that a cache keeps beside a window
    """
    is_window = config.window is not None
    lengths = {planned_length(config)} if is_window else {planned_length(config), config.max_position_embeddings}
    computed = default_kv_bits(config, stored)
    found = []
    for tokens in sorted(lengths):
        positions = tokens + (slack if is_window else 0)
        # 4.5 bits with scales and biases.
        bits = {f"{computed} bits": float(computed), "4 bits": 4.5}
        caches = {name: cache_bytes(config, positions, size) for name, size in bits.items()}
        # The scores of a prompt's chunk, and what is made of them; kernels keep none.
        scores = 3 * 4 * 128 * config.n_heads * positions if on_cpu() and not has_kernels() else 0
        found.append(Footprint(tokens, is_window, loaded_bytes(config, stored), caches, AROUND + scores))
    return found
