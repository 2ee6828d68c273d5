"""The engines, each behind the same few calls.

Nothing is imported before its engine is asked for: m7mlx brings a BLAS into its process, which MLX is
to have, in mlx-lm's runs too, and torch is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

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
        """Begin anew with random keys and values for so many tokens, which cost what true ones do."""

    def tokens(self) -> Iterator[int]:
        """Decode greedily from there on, in the engine's own loop."""

    def kv_bytes(self) -> int:
        """Return the bytes allocated for keys and values."""


class M7:
    """m7mlx."""

    compiled = False
    kv_bits: int | None = None

    def __init__(self, folder: Path) -> None:
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
        held = min(position, config.sliding_window or position)
        for ring in self._cache.rings:
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


class MlxLm:
    """mlx-lm as shipped: it takes Mistral for a Llama and has no window."""

    rotating = False

    def __init__(self, folder: Path) -> None:
        from m7mlx.arrays import nbytes  # first: its BLAS, before MLX is imported

        # isort: split
        from mlx_lm.utils import load_model

        self._model, self._config = load_model(folder)
        tied = self._config.get("tie_word_embeddings")
        untied = 0 if tied else nbytes(self._model.model.embed_tokens)
        self.moved_bytes = nbytes(self._model) - untied
        self._cache: list[Any] = []
        self._steps: Any = iter(())
        self._first: Any = None  # the token of the prompt, until it is given

    def _new_cache(self) -> list[Any]:
        from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

        if self.rotating:
            return [RotatingKVCache(self._config["sliding_window"], keep=0) for _ in self._model.layers]
        return make_prompt_cache(self._model)

    def read(self, ids: Sequence[int]) -> None:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        self._cache = self._new_cache()
        # Its loop computes one token ahead: what it yields first is the prompt's token.
        prompt = mx.array(list(ids))
        self._steps = generate_step(prompt, self._model, prompt_cache=self._cache, max_tokens=-1)
        self._first = next(self._steps)[0]

    def fill(self, position: int) -> None:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        self._cache = self._new_cache()
        dtype = self._model.model.norm.weight.dtype
        heads, config = self._config["num_key_value_heads"], self._config
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        for layer in self._cache:
            for start in range(0, position, FILL):
                shape = (1, heads, min(FILL, position - start), dim)
                layer.update_and_fetch(*(mx.random.normal(shape, dtype=dtype) for _ in range(2)))
                mx.eval(layer.keys, layer.values)
        self._steps = generate_step(mx.array([1]), self._model, prompt_cache=self._cache, max_tokens=-1)
        self._first = None

    def tokens(self) -> Iterator[int]:
        if self._first is not None:
            yield self._first
            self._first = None
        for token, _ in self._steps:
            yield token

    def kv_bytes(self) -> int:
        return sum(int(layer.keys.nbytes) + int(layer.values.nbytes) for layer in self._cache)


class MlxLmRotating(MlxLm):
    """mlx-lm with its own rotating cache, of the window's size, put in by hand."""

    rotating = True


class Transformers:
    """Hugging Face's model on torch, with its window."""

    dtype = "float32"

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.dtype)).eval()
        self._config = self._model.config
        embedding = self._model.get_input_embeddings().weight
        untied = embedding if not self._config.tie_word_embeddings else embedding[:0]
        self.moved_bytes = sum(p.numel() * p.element_size() for p in self._model.parameters())
        self.moved_bytes -= untied.numel() * untied.element_size()
        self._cache: Any = None
        self._position, self._next = 0, 0

    def _run(self, ids: Sequence[int]) -> int:
        torch = self._torch
        with torch.no_grad():
            positions = torch.arange(self._position, self._position + len(ids))[None]
            out = self._model(
                torch.tensor([ids]), past_key_values=self._cache, position_ids=positions, logits_to_keep=1
            )
        self._position += len(ids)
        return int(out.logits[0, -1].argmax())

    def _begin(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._config)
        self._position = 0

    def read(self, ids: Sequence[int]) -> None:
        self._begin()
        # In one piece, a long prompt takes memory with its square.
        edges = [*range(0, len(ids), 512), len(ids)]
        for start, end in pairwise(edges):
            self._next = self._run(ids[start:end])

    def fill(self, position: int) -> None:
        torch, config = self._torch, self._config
        self._begin()
        for layer in range(config.num_hidden_layers):
            for start in range(0, position, FILL):
                shape = (1, config.num_key_value_heads, min(FILL, position - start), config.head_dim)
                self._cache.update(*(torch.randn(shape, dtype=self._model.dtype) for _ in range(2)), layer)
        self._position, self._next = position, 1

    def tokens(self) -> Iterator[int]:
        while True:
            token = self._next
            self._next = self._run([token])
            yield token

    def kv_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self._cache.layers for t in (layer.keys, layer.values))


class TransformersHalf(Transformers):
    """Hugging Face's model on torch, in bfloat16."""

    dtype = "bfloat16"


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a GGUF file; only reading fills its caches."""

    def __init__(self, folder: Path) -> None:
        import llama_cpp

        self._llm = llama_cpp.Llama(
            str(folder), n_ctx=0, n_threads=os.cpu_count(), n_threads_batch=os.cpu_count(), verbose=False
        )
        self.moved_bytes = folder.stat().st_size

    def read(self, ids: Sequence[int]) -> None:
        self._llm.reset()
        self._llm.eval(list(ids))

    def fill(self, position: int) -> None:
        raise NotImplementedError

    def tokens(self) -> Iterator[int]:
        while True:
            token = int(self._llm.sample(temp=0.0))
            self._llm.eval([token])
            yield token

    def kv_bytes(self) -> int:
        raise NotImplementedError


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
    import importlib.util

    return importlib.util.find_spec(_needs(name)[0]) is not None


def needed_packages(name: str) -> str:
    """Return what `pip install` has to bring for an engine."""
    return _needs(name)[1]


def _needs(name: str) -> tuple[str, str]:
    return next((needed for start, needed in _NEEDS.items() if name.startswith(start)), ("m7mlx", "m7mlx"))
