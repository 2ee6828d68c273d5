"""An engine, as m7mlx-bench sees it: a few calls, whatever is behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

FILL = 2048  # rows of keys and values added at a time


class Engine(Protocol):
    """One engine with one model, and one sequence of up to `length` tokens in it."""

    def __init__(self, folder: Path, length: int) -> None: ...

    @property
    def moved_bytes(self) -> int:
        """Bytes of the weights that every token needs: of an untied embedding not even a row."""

    def read(self, ids: Sequence[int]) -> None:
        """Begin anew with a prompt, read as this engine reads prompts."""

    def fill(self, position: int) -> None:
        """Begin anew with random keys and values for so many tokens, as costly as true ones.

        Raises NotImplementedError if the engine can only read tokens.
        """

    def tokens(self) -> Iterator[int]:
        """Decode greedily from there on, in the engine's own loop."""

    def kv_bytes(self) -> int:
        """Return the bytes of the keys and values, and of what is allocated with them."""
