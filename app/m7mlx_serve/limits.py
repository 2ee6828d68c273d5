"""How much the server does at a time, and the memory that this takes."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from m7mlx.config import ModelConfig
from m7mlx.errors import BusyError, InputError
from m7mlx.memory import UNDO_SLACK, cache_bytes
from m7mlx.model import Mistral


@dataclass(frozen=True)
class Limits:
    """How much the server does at a time.

    rows     answers at a time
    queue    requests that may wait besides
    kept     ended conversations that are kept for those that begin alike
    kv_bits  of keys and values; None takes the model's default
    drafted  answers at a time that drafts are tried for
    max_kv_size  tokens that a conversation keeps where no window bounds it; None keeps all
    """

    rows: int = 8
    queue: int = 64
    kept: int = 8
    kv_bits: int | None = None
    drafted: int = 2
    max_kv_size: int | None = None

    def bound(self, config: ModelConfig) -> int | None:
        """The `max_kv_size` of a model's caches: none where its own window bounds them."""
        if self.max_kv_size is None or config.window is not None:
            return None
        return min(self.max_kv_size, config.max_position_embeddings)


class Places:
    """Places for answers, those that wait included; event loops alone."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self.taken = 0

    def take(self, n: int) -> None:
        """Take places for `n` answers. Raises InputError for more than there are, and BusyError."""
        if n > self._most:
            raise InputError(
                f"n: {n} answers at a time are more than the {self._most} that this server has places for"
            )
        with self._lock:
            if self.taken + n > self._most:
                raise BusyError("too many requests are waiting; try again later")
            self.taken += n

    def give(self, n: int) -> None:
        """Give places back."""
        with self._lock:
            self.taken -= n


def rows_memory(model: Mistral, limits: Limits) -> int:
    """The most bytes that keys and values take: those of every row and every conversation kept."""
    config = model.config
    positions = (config.window or limits.bound(config) or config.max_position_embeddings) + UNDO_SLACK
    bits = model.new_cache(kv_bits=limits.kv_bits).format.stored_bits(model.dtype)
    return (limits.rows + limits.kept) * cache_bytes(config, positions, bits)
