"""What one rank of several holds of a model: some of every layer's heads, or some of the layers.

    tensor    a rank has heads / N, KV heads / N and feed-forward / N of every layer; after
              attention and after the feed-forward, all ranks add up their results: twice a layer
              (Megatron-LM, arXiv 1909.08053)
    pipeline  a rank has layers / N and hands its hidden states to the next, once a pass

Either way a rank's model is a smaller one of the same kind, with a configuration of its own; so its
cache holds only its own KV heads or layers. Embedding and head, 4 % of Mistral 7B, are held by
every rank that needs them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError
from m7mlx.quantization import Quantization

Mode = Literal["tensor", "pipeline"]
MODES: tuple[Mode, ...] = ("tensor", "pipeline")
_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")
_BY_ROWS = re.compile(r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.")  # their outputs are divided
_BY_COLUMNS = re.compile(r"\.(o_proj|down_proj)\.")  # their inputs are


@dataclass(frozen=True)
class Shard:
    """The share of rank `rank` of `size`. All methods take the configuration of the whole model."""

    mode: Mode
    rank: int
    size: int

    def config(self, whole: ModelConfig) -> ModelConfig:
        """Return the configuration of this rank's model.

        Raises ConfigError if the model cannot be divided in this way.
        """
        if self.mode == "pipeline":
            if self.size > whole.n_layers:
                raise ConfigError(f"{whole.n_layers} layers cannot be divided among {self.size} processes")
            scheme = whole.quantization
            mine = whole.of_layers(self._layers(whole))
            return replace(mine, quantization=scheme and self._renumbered(scheme, whole))
        for what, count in (("KV heads", whole.n_kv_heads), ("feed-forward columns", whole.intermediate_size)):
            if count % self.size:
                raise ConfigError(
                    f"{count} {what} cannot be divided among {self.size} processes; take a number that divides "
                    "them, or divide the layers: --parallel pipeline"
                )
        return replace(
            whole,
            n_heads=whole.n_heads // self.size,
            n_kv_heads=whole.n_kv_heads // self.size,
            intermediate_size=whole.intermediate_size // self.size,
        )

    def name(self, stored: str, whole: ModelConfig) -> str | None:
        """Return the name of a stored tensor in this rank's model; None if it holds none of it."""
        if self.mode == "tensor":
            return stored
        if stored.startswith("model.embed_tokens."):
            return stored if self.rank == 0 or whole.tie_word_embeddings else None
        found = _LAYER.fullmatch(stored)
        if found is None:
            return stored
        layers = self._layers(whole)
        index = int(found[2])
        return f"{found[1]}{index - layers.start}{found[3]}" if index in layers else None

    def slices(self, stored: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Return which rows and columns of a stored tensor of this shape are this rank's."""
        axis = 0 if _BY_ROWS.search(stored) else 1 if _BY_COLUMNS.search(stored) else None
        if self.mode == "pipeline" or axis is None:
            return tuple(slice(n) for n in shape)
        if shape[axis] % self.size:  # groups of a quantised row
            raise ConfigError(
                f"{stored} has {shape[axis]} columns or groups, which {self.size} processes cannot divide; "
                "take fewer, or divide the layers: --parallel pipeline"
            )
        share = shape[axis] // self.size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        return (mine, slice(shape[1])) if axis == 0 else (slice(shape[0]), mine)

    def nbytes(self, tensors: dict[str, tuple[tuple[int, ...], int]], whole: ModelConfig) -> int:
        """Return the bytes of this rank's share of tensors {name: (shape, bytes)}."""
        total = 0
        for name, (shape, size) in tensors.items():
            if self.name(name, whole) is not None:
                for n, mine in zip(shape, self.slices(name, shape), strict=True):
                    size = size * len(range(*mine.indices(n))) // n
                total += size
        return total

    def _layers(self, whole: ModelConfig) -> range:
        n = whole.n_layers
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def _renumbered(self, scheme: Quantization, whole: ModelConfig) -> Quantization:
        """Return the scheme with its overrides under this rank's layer numbers."""
        names = {path: self.name(f"{path}.weight", whole) for path in scheme.overrides}
        kept = {name.removesuffix(".weight"): scheme.overrides[path] for path, name in names.items() if name}
        return replace(scheme, overrides=kept)
