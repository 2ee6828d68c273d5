"""m7mlx as engines: as it is, compiled, and with keys and values in fewer bits.

An engine imports what it needs when it is made (see engines.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from m7mlx_bench.engine import FILL


class M7:
    """m7mlx."""

    compiled = False
    kv_bits: int | None = None

    def __init__(self, folder: Path, length: int) -> None:
        from m7mlx.arrays import nbytes
        from m7mlx.loading import load_model

        self._model = load_model(folder)
        self._model.compiles_steps = self.compiled
        untied = 0 if self._model.config.tie_word_embeddings else nbytes(self._model.model.embed_tokens)
        self.moved_bytes = self._model.nbytes - untied
        self._cache = self._model.new_cache(kv_bits=self.kv_bits)
        self._logits: Any = None  # until something is read or filled

    def read(self, ids: Sequence[int]) -> None:
        import mlx.core as mx

        from m7mlx.decode import default_chunk, prefill

        self._cache = self._model.new_cache(kv_bits=self.kv_bits)
        self._logits = prefill(self._model, ids, self._cache, default_chunk(self._model))
        mx.eval(self._logits)

    def fill(self, position: int) -> None:
        import mlx.core as mx

        config = self._model.config
        self._cache = self._model.new_cache(kv_bits=self.kv_bits)
        for ring in self._cache.rings:
            held = min(position, ring.window or position)
            for start in range(position - held, position, FILL):
                shape = (1, config.n_kv_heads, min(FILL, position - start), config.head_dim)
                k, v = (mx.random.normal(shape, dtype=self._model.dtype) for _ in range(2))
                ring.write(ring.format.encode(k) + ring.format.encode(v), start)
            mx.eval(ring.arrays)
        self._cache.positions = self._cache.positions.at(position)
        self._logits = mx.zeros((1, config.vocab_size))

    def tokens(self) -> Iterator[int]:
        from m7mlx.decode import decode
        from m7mlx.sampling import Sampler, Sampling

        return decode(self._model, self._logits, self._cache, Sampler(Sampling(temperature=0)), None)

    def kv_bytes(self) -> int:
        return self._cache.nbytes


class M7Compiled(M7):
    """m7mlx with the compiled step."""

    compiled = True


class M7EightBits(M7):
    """m7mlx with keys and values in 8 bits."""

    kv_bits = 8


class M7FourBits(M7):
    """m7mlx with keys and values in 4 bits."""

    kv_bits = 4
