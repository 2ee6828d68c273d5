"""The engines of others: mlx-lm, transformers and llama.cpp.

An engine imports what it needs when it is made (see engines.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from m7mlx_bench.engine import FILL


class MlxLm:
    """mlx-lm as shipped: it takes Mistral for a Llama and has no window."""

    rotating = False

    def __init__(self, folder: Path, length: int) -> None:
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

    def __init__(self, folder: Path, length: int) -> None:
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
    """llama.cpp through llama-cpp-python, on a GGUF file; only reading fills its cache."""

    def __init__(self, folder: Path, length: int) -> None:
        import llama_cpp

        self._file, self._library = folder, llama_cpp
        threads = os.cpu_count()
        # Flash attention is llama.cpp's own default, and not that of llama-cpp-python.
        self._llm = llama_cpp.Llama(
            str(folder), n_ctx=length, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
        )

    @property
    def moved_bytes(self) -> int:
        from gguf import GGUFReader

        sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(self._file).tensors}
        return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)

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
        """Return the bytes of the tokens held, in float16; room for `length` is made at once."""
        library, model = self._library, self._llm.model
        heads, layers = library.llama_model_n_head_kv(model), library.llama_model_n_layer(model)
        dim = int(
            self._llm.metadata.get("llama.attention.key_length")
            or library.llama_model_n_embd(model) // library.llama_model_n_head(model)
        )
        return 2 * 2 * int(self._llm.n_tokens * layers * heads) * dim
