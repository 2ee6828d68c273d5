"""The distance of a converted model from its source.

Both run side by side on one text: in every batch, row 0 is the source and row 1 the result. A
matrix of each is read when its turn comes, expanded some rows at a time and dropped after it, so
that two models of 7 billion numbers need the memory of two of their matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from m7mlx.arrays import on_cpu
from m7mlx.attention import LayerPass
from m7mlx.cache import RollingCache
from m7mlx.config import ModelConfig
from m7mlx.errors import InputError
from m7mlx.model import Block
from m7mlx.scoring import compare_logits
from m7mlx.units import counted
from m7mlx_convert.progress import Reporter
from m7mlx_convert.source import Source, Tensor
from m7mlx_convert.text import Text

_CHUNK = 512  # tokens that pass through a matrix at one time
_HEAD_CHUNK = 128  # the head gives two rows of logits a token
_SLICE = 1 << 24  # numbers of a matrix that are expanded at one time
_MAY_DIFFER = {"model_type", "quantization", "bos_token_id", "eos_token_ids", "max_position_embeddings"}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Comparison:
    """The distance of a result from its source; logarithms are natural.

    weights    module → |W' − W| / |W|, Frobenius norms
    hidden     layer by layer, the same of the hidden states that leave it, over all tokens
    kl         KL(source ‖ result) of the prediction at each position but the last
    agrees     whether both predict the same token there
    losses     −log p of the token that follows, by the source and by the result
    """

    source: str
    result: str
    text: Text
    weights: Mapping[str, float]
    hidden: Sequence[float]
    kl: np.ndarray
    agrees: np.ndarray
    losses: np.ndarray  # [2, positions]

    @cached_property
    def perplexities(self) -> tuple[float, float]:
        """The perplexity of the source and of the result."""
        before, after = np.exp(self.losses.mean(axis=1))
        return float(before), float(after)

    def layer(self, index: int) -> tuple[str, float, float]:
        """Return a layer's worst matrix, its error, and that of all together (root mean square)."""
        prefix = f"model.layers.{index}."
        errors = {name.removeprefix(prefix): e for name, e in self.weights.items() if name.startswith(prefix)}
        worst = max(errors, key=lambda name: errors[name])
        return worst, errors[worst], float(np.sqrt(np.mean(np.square(list(errors.values())))))

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as `--json` prints it."""
        return {
            "source": self.source,
            "result": self.result,
            "tokens": len(self.text.ids),
            "perplexity": {"source": self.perplexities[0], "result": self.perplexities[1]},
            "kl": {
                "mean": float(self.kl.mean()),
                "p99": float(np.quantile(self.kl, 0.99)),
                "max": float(self.kl.max()),
            },
            "top1_agreement": float(self.agrees.mean()),
            "hidden_errors": list(self.hidden),
            "weight_errors": dict(self.weights),
        }


def compare(source: Source, result: Source, text: Text, reporter: Reporter) -> Comparison:
    """Compare both models on `text`. Raises InputError for unlike models, or a text too long."""
    _check_match(source, result)
    config = source.config
    if config.window is None and len(text.ids) > config.max_position_embeddings:
        raise InputError(
            f"{source.name} sees {counted(config.max_position_embeddings, 'token')} at most, not {len(text.ids):,}; "
            f"give --tokens {config.max_position_embeddings}"
        )
    both = _Both(source, result)
    total = len(text.ids) * (config.n_layers + 1)
    with reporter.task("Comparing", total, unit="tokens") as advance:
        chunks = both.embed(mx.array(list(text.ids)))
        hidden = []
        for index in range(config.n_layers):
            chunks = both.layer(index, chunks, advance)
            hidden.append(_relative(chunks))
        kl, agrees, losses = both.predictions(chunks, mx.array(list(text.ids)), advance)
    return Comparison(source.name, result.name, text, both.errors, hidden, kl, agrees, losses)


def _check_match(source: Source, result: Source) -> None:
    """Raise InputError if the result cannot have come from the source."""
    for field in fields(ModelConfig):
        a, b = getattr(source.config, field.name), getattr(result.config, field.name)
        if a != b and field.name not in _MAY_DIFFER:
            raise InputError(
                f"{result.name} does not come from {source.name}: {field.name} is {b} in the one, {a} in the other"
            )


class _Both:
    """The layers of both models, one at a time; `errors` fills with those of the weights seen."""

    def __init__(self, source: Source, result: Source) -> None:
        self._config = replace(source.config, quantization=None)
        self._tensors = (source.tensors, result.tensors)
        self.errors: dict[str, float] = {}

    def embed(self, ids: mx.array) -> list[mx.array]:
        """Return the embeddings [2, L, hidden_size] of the ids, chunk by chunk."""
        rows = self._pair("model.embed_tokens").rows(ids)
        return list(mx.split(rows, range(_CHUNK, ids.size, _CHUNK), axis=1))

    def layer(self, index: int, chunks: list[mx.array], advance: Callable[[int], None]) -> list[mx.array]:
        """Return the hidden states that leave a layer, for those that enter it."""
        prefix = f"model.layers.{index}."
        block = Block(self._config)
        for name in _ATTENTION:
            setattr(block.self_attn, name, _Linear(self._pair(f"{prefix}self_attn.{name}")))
        for name in _FEED_FORWARD:
            setattr(block.mlp, name, _Linear(self._pair(f"{prefix}mlp.{name}")))
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(block, name, self._norm(prefix + name))
        cache = RollingCache(self._config.of_layers(range(index, index + 1)))
        [ring] = cache.rings
        left = []
        for chunk in chunks:
            length = chunk.shape[1]
            cache.begin(length)
            forward = cache.positions.forward_passes(length)[ring.kind]
            left.append(block(chunk, [LayerPass(ring, forward)]))
            cache.advance(length)
            mx.eval(left, cache.arrays)
            mx.clear_cache()
            advance(length)
        return left

    def predictions(
        self,
        chunks: list[mx.array],
        ids: mx.array,
        advance: Callable[[int], None],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return divergence, agreement and losses at each position but the last."""
        norm = self._norm("model.norm")
        head = self._pair("model.embed_tokens" if self._config.tie_word_embeddings else "lm_head")
        states = norm(mx.concatenate(chunks, axis=1))[:, :-1]
        found = []
        for start in range(0, states.shape[1], _HEAD_CHUNK):
            part = states[:, start : start + _HEAD_CHUNK]
            source, result = head.product(part)
            found.append(compare_logits(result, source, ids[start + 1 : start + 1 + part.shape[1]]))
            mx.clear_cache()
            advance(part.shape[1])
        advance(1)
        kl, agrees, *logprobs = map(np.concatenate, zip(*found, strict=True))
        return kl, agrees, -np.stack(logprobs[::-1])

    def _pair(self, module: str) -> _Pair:
        name = f"{module}.weight"
        return _Pair(module, (self._tensors[0][name], self._tensors[1][name]), self.errors)

    def _norm(self, module: str) -> _Norm:
        weights = [side[f"{module}.weight"].floats().astype(mx.float32) for side in self._tensors]
        return _Norm(mx.stack(weights), self._config.norm_eps)


@dataclass(frozen=True)
class _Pair:
    """One matrix of both models, expanded some rows at a time."""

    module: str
    tensors: tuple[Tensor, Tensor]
    errors: dict[str, float]

    def rows(self, ids: mx.array) -> mx.array:  # [L] → [2, L, columns]
        """Return single rows, as an embedding gives them."""
        sides = []
        for tensor in self.tensors:
            sides.append(tensor.expand({kind: a[ids] for kind, a in tensor.read().items()}).astype(mx.float32))
            mx.eval(sides)
            mx.clear_cache()
        if self.module not in self.errors:
            for _ in self._slices():
                pass
        return mx.stack(sides)

    def product(self, x: mx.array) -> mx.array:  # [2, L, in] → [2, L, out]
        """Multiply each row of the batch with its own matrix."""
        found: tuple[list[mx.array], list[mx.array]] = ([], [])
        for sides in self._slices():
            for side, weight in enumerate(sides):
                found[side].append(_matmul(x[side], weight))
            mx.eval(found)
        return mx.stack([mx.concatenate(parts, axis=-1) for parts in found])

    def _slices(self) -> Iterator[tuple[mx.array, mx.array]]:
        """Yield rows of both in float32; `errors` has their distance afterwards."""
        stored = [tensor.read() for tensor in self.tensors]
        rows, columns = self.tensors[0].shape
        step = max(1, _SLICE // columns)
        difference = size = 0.0
        for start in range(0, rows, step):
            a, b = (
                tensor.expand({kind: array[start : start + step] for kind, array in arrays.items()}).astype(
                    mx.float32
                )
                for tensor, arrays in zip(self.tensors, stored, strict=True)
            )
            yield a, b
            if self.module not in self.errors:
                difference += _squares(b - a)
                size += _squares(a)
            del a, b
            mx.clear_cache()
        self.errors.setdefault(self.module, _ratio(difference, size))


class _Linear(nn.Module):
    """A linear layer of both models."""

    def __init__(self, pair: _Pair) -> None:
        super().__init__()
        self._pair = pair

    def __call__(self, x: mx.array) -> mx.array:
        return self._pair.product(x)


class _Norm(nn.Module):
    """A norm of both models."""

    def __init__(self, weights: mx.array, eps: float) -> None:  # [2, hidden_size]
        super().__init__()
        self.weights, self.eps = weights, eps

    def __call__(self, x: mx.array) -> mx.array:  # [2, L, hidden_size]
        return mx.fast.rms_norm(x, None, self.eps) * self.weights[:, None]


# On a CPU by NumPy: its wheels come with OpenBLAS, MLX's with a BLAS that is forty times as slow.


def _matmul(x: mx.array, weight: mx.array) -> mx.array:  # [L, in], [out, in] → [L, out]
    if on_cpu():
        return mx.array(np.array(x, copy=False) @ np.array(weight, copy=False).T)
    return x @ weight.T


def _squares(array: mx.array) -> float:
    """Return the sum of the squares."""
    if on_cpu():
        flat = np.array(array, copy=False).reshape(-1)
        return float(np.dot(flat, flat))
    return float(mx.square(array).sum())


def _relative(chunks: Sequence[mx.array]) -> float:
    """Return the relative distance of row 1 from row 0 over all chunks [2, L, hidden_size]."""
    return _ratio(sum(_squares(chunk[1] - chunk[0]) for chunk in chunks), sum(_squares(chunk[0]) for chunk in chunks))


def _ratio(difference: float, size: float) -> float:
    """Return |a − b| / |b| from the sums of squares."""
    return float(np.sqrt(difference / size)) if size else float(difference > 0)
