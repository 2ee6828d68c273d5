"""What a chat takes of a machine's memory: weights, and keys and values as far as the model sees."""

from __future__ import annotations

import os
from typing import Any

from m7mlx.config import ModelConfig

CHAT_SLACK = 64  # tokens that a chat can undo: a stop text, a draft, an answer that was broken off


def machine_memory() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_bytes(config: ModelConfig, positions: int, bits: float = 16) -> int:
    """Bytes of keys and values: 2 · layers · KV heads · head_dim · positions numbers of so many bits."""
    return int(2 * config.n_layers * config.n_kv_heads * config.head_dim * positions * bits / 8)


def chat_memory(config: ModelConfig, weights: int) -> list[dict[str, Any]]:
    """Bytes that a chat takes with so many bytes of weights: at the window, or at 4,096 tokens and the whole context.

    4-bit rows take 4.5 bits a number, their scales and biases included.
    """
    whole = config.max_position_embeddings
    lengths = [config.sliding_window] if config.sliding_window else sorted({min(4096, whole), whole})
    found = []
    for length in lengths:
        positions = length + (CHAT_SLACK if config.sliding_window else 0)
        caches = {"16 bits": cache_bytes(config, positions), "4 bits": cache_bytes(config, positions, 4.5)}
        found.append(
            {"tokens": length, "is_window": config.sliding_window is not None}
            | {"weights_bytes": weights, "cache_bytes": caches}
        )
    return found
