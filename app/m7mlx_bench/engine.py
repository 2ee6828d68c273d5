"""An engine, as m7mlx-bench sees it: a few calls, whatever is behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

FILL = 2048  # rows of keys and values added at a time


class Engine(Protocol):
    """One engine with one model, and one sequence in it.

    moved_bytes  of the weights that every token needs: all, but of an untied embedding only a row
    """

    moved_bytes: int

    def __init__(self, folder: Path) -> None: ...

    def read(self, ids: Sequence[int]) -> None:
        """Begin anew with a prompt, read as this engine reads prompts."""

    def fill(self, position: int) -> None:
        """Begin anew with random keys and values for so many tokens, as costly as true ones."""

    def tokens(self) -> Iterator[int]:
        """Decode greedily from there on, in the engine's own loop."""

    def kv_bytes(self) -> int:
        """Return the bytes allocated for keys and values."""
