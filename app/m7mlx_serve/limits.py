"""How much the server does at a time, and the memory that this takes."""

from __future__ import annotations

from dataclasses import dataclass

from m7mlx.memory import UNDO_SLACK, cache_bytes
from m7mlx.model import Mistral


@dataclass(frozen=True)
class Limits:
    """How much the server does at a time.

    rows     answers at a time
    queue    requests that may wait besides
    kept     ended conversations that are kept for those that begin alike
    kv_bits  of keys and values; None takes the model's default
    """

    rows: int = 8
    queue: int = 64
    kept: int = 8
    kv_bits: int | None = None


def rows_memory(model: Mistral, limits: Limits) -> int:
    """The most bytes that keys and values take: those of every row and every conversation kept."""
    config = model.config
    positions = (config.window or config.max_position_embeddings) + UNDO_SLACK
    bits = model.new_cache(kv_bits=limits.kv_bits).format.stored_bits(model.dtype)
    return (limits.rows + limits.kept) * cache_bytes(config, positions, bits)
