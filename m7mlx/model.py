"""Mistral: embedding → blocks (RMSNorm, attention, SwiGLU) → head.

Modules have the names that their weights have on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Unpack

import mlx.core as mx
import mlx.nn as nn

from m7mlx.arrays import nbytes
from m7mlx.attention import Attention, LayerPass
from m7mlx.cache import CacheOptions, KVCache, RollingCache
from m7mlx.config import ModelConfig
from m7mlx.errors import InputError, TokenizerError
from m7mlx.exchange import Exchange
from m7mlx.positions import ForwardPass
from m7mlx.products import look_up, project, project_gated
from m7mlx.ring import LayerRing
from m7mlx.units import in_gigabytes


class FeedForward(nn.Module):
    """The feed-forward network, SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def __call__(self, x: mx.array, norm: nn.RMSNorm) -> mx.array:  # [B, L, hidden_size]
        """Return x, to which the network's answer to norm(x) is added."""
        gate_up = (self.gate_up_proj,) if "gate_up_proj" in self else (self.gate_proj, self.up_proj)  # after `fuse`
        return project(project_gated(x, gate_up, norm), (self.down_proj,), residual=x)


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised copy and added back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def __call__(self, x: mx.array, passes: Sequence[LayerPass]) -> mx.array:  # [B, L, hidden_size]
        x = self.self_attn(x, self.input_layernorm, passes)
        return self.mlp(x, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Everything but the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.n_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)


class Mistral(nn.Module):
    """A decoder-only transformer of Mistral's shape.

    model(ids)              logits [B, L, vocab_size] for ids [B, L], the whole sequence at once
    model(ids, cache)       the same for the tokens that follow those in the cache
    model.logits(…)         without a look at the ids, where they are known to be the vocabulary's
    model.logits_together(…)
                            of several caches in one pass, each with as many tokens as it has
    model.hidden(…)         without the head; `model.head` gives the logits of the positions wanted
    model.identity          what a cache knows its model by
    model.adapter           name of the LoRA adapter on it (`m7mlx.set_adapter`); None for none
    model.exchange          set where other processes hold shards of it; all of them run each pass
    model.kv_bits           bits of keys and values in a new cache that is not told otherwise; None
                            stores them as computed
    model.compiles_steps    whether a token is decoded by a compiled function (`m7mlx.compiled`)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.identity = self._own_identity = object()
        self.adapter: str | None = None
        self.exchange: Exchange | None = None
        self.compiles_steps = False
        self.kv_bits: int | None = None
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, ids: mx.array, cache: KVCache | None = None) -> mx.array:
        """Return the logits, after a look at the ids: past the embedding lies memory of others.

        Raises InputError for ids that are not integers [B, L], TokenizerError if one is outside the
        vocabulary.
        """
        if not isinstance(ids, mx.array) or ids.ndim != 2 or not mx.issubdtype(ids.dtype, mx.integer):
            raise InputError("a model takes ids as an mx.array of integers [B, L]")
        if ids.size and not 0 <= ids.min().item() <= ids.max().item() < self.config.vocab_size:  # type: ignore[operator]
            raise TokenizerError(f"there are token ids outside the model's vocabulary of {self.config.vocab_size}")
        return self.logits(ids, cache)

    def logits(self, ids: mx.array, cache: KVCache | None = None) -> mx.array:
        """Return the logits without a look at the ids."""
        return self.head(self.hidden(ids, cache))

    def logits_together(self, passes: Sequence[tuple[mx.array, KVCache]]) -> list[mx.array]:
        """Return the logits of several passes, each over ids [B, L] and a cache of B rows.

        They are those of one pass after the other, but the tokens of all go through the model side
        by side, so that weights are read once.
        """
        if len(passes) == 1:
            return [self.logits(*passes[0])]
        logits = self.head(self._run(mx.concatenate([ids.reshape(1, -1) for ids, _ in passes], axis=1), passes))
        ends = list(accumulate(ids.size for ids, _ in passes))
        parts = mx.split(logits, ends[:-1], axis=1)
        return [part.reshape(*ids.shape, -1) for part, (ids, _) in zip(parts, passes, strict=True)]

    def hidden(self, ids: mx.array, cache: KVCache | None = None) -> mx.array:
        """Return the last hidden states [B, L, hidden_size], normalised, for ids [B, L].

        The cache advances by L.
        """
        cache = self.new_cache() if cache is None else cache
        return self._run(ids, [(ids, cache)])

    def _run(self, all_ids: mx.array, passes: Sequence[tuple[mx.array, KVCache]]) -> mx.array:
        """Run passes over ids and caches, all of whose ids are `all_ids`; the caches go on."""
        for ids, cache in passes:
            cache.bind(self.identity, self.config)
            cache.begin(ids.shape[1])
        described = [(cache.rings, cache.positions.forward_passes(ids.shape[1])) for ids, cache in passes]
        hidden = self.through(all_ids, described)
        for ids, cache in passes:
            cache.advance(ids.shape[1])
        return hidden

    def through(
        self,
        ids: mx.array,
        passes: Sequence[tuple[Sequence[LayerRing], Sequence[ForwardPass]]],
    ) -> mx.array:
        """Run a forward pass over ids [B, L], or several over ids [1, all their tokens].

        passes  for each, a ring for each layer, and its description for each kind of layer
        """
        x: mx.array
        if self.exchange is None or self.exchange.is_first:
            x = look_up(ids, self.model.embed_tokens, self.dtype)
        else:
            x = self.exchange.receive((*ids.shape, self.config.hidden_size), self.dtype)
        for i, block in enumerate(self.model.layers):
            x = block(x, [LayerPass(rings[i], forwards[rings[i].kind]) for rings, forwards in passes])
        if self.exchange is not None and not self.exchange.is_last:
            return self.exchange.send(x)
        normed: mx.array = self.model.norm(x)
        return normed

    def head(self, hidden: mx.array) -> mx.array:
        """Return the logits [B, L, vocab_size] of hidden states [B, L, hidden_size]."""
        if self.exchange is not None:
            hidden = self.exchange.from_last(hidden)
        return project(hidden, (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head,))

    def agree(self, tokens: mx.array) -> mx.array:
        """Return the tokens that were chosen, the same in all processes that share the model."""
        return tokens if self.exchange is None else self.exchange.agree(tokens)

    def new_cache(self, **options: Unpack[CacheOptions]) -> RollingCache:
        """Return an empty cache for this model; options as for `RollingCache`.

        A `kv_bits` of None takes the model's default, `model.kv_bits`.
        """
        if options.get("kv_bits") is None:
            options["kv_bits"] = self.kv_bits
        cache = RollingCache(self.config, **options)
        cache.bind(self.identity, self.config)
        return cache

    def changed_by(self, adapter: str | None) -> None:
        """Note which adapter is on the model (None: none); older caches no longer belong to it."""
        self.adapter = adapter
        self.identity = self._own_identity if adapter is None else object()

    def __repr__(self) -> str:
        config, scheme = self.config, self.config.quantization
        bits = "" if scheme is None else f" in {scheme.bits} bits" + (" and others" if scheme.overrides else "")
        window = "no window" if config.sliding_window is None else f"window {config.sliding_window:,}"
        if config.layer_types:
            window += f" in {config.n_layers - config.windows.count(None)} of them"
        adapter = "" if self.adapter is None else f", adapter {self.adapter!r}"
        return (
            f"Mistral({config.n_weights:,} parameters{bits}, {config.n_layers} layers of {config.hidden_size:,}, "
            f"{window}, {in_gigabytes(self.nbytes, 2)} for {str(self.dtype).removeprefix('mlx.core.')}{adapter})"
        )

    @property
    def dtype(self) -> mx.Dtype:
        """The type of activations, keys and values."""
        dtype: mx.Dtype = self.model.norm.weight.dtype
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return nbytes(self)
