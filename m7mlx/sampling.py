"""Logits → the next token.

The filters and their order are those of mlx-lm (top_p, min_p, top_k, then the temperature), so that
the same settings give the same distribution. Randomness comes from a key of the request's own, not
from MLX's global state: the same seed gives the same answer whatever else runs.
"""

from __future__ import annotations

import copy
import math
import random
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from m7mlx.errors import InputError
from m7mlx.logprobs import Scored, score_token

if TYPE_CHECKING:
    from m7mlx.constrain import Constraint


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy decoding.

    temperature         0 takes the most probable token
    top_p               keep the most probable tokens that together reach this probability; 1 keeps
                        all
    top_k               keep this many most probable tokens; 0 keeps all
    min_p               keep tokens at least this probable, relative to the most probable one; 0
                        keeps all
    repetition_penalty  divide (or multiply, if negative) the logits of recent tokens by this; 1
                        changes nothing
    repetition_context  how many of the last tokens, prompt included, count as recent
    presence_penalty    subtract this from the logits of ids that the answer holds already
    frequency_penalty   subtract this from the logit of an id for each time that the answer holds it
    seed                makes sampling repeatable; None draws a new one

    Raises InputError for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (self.temperature, 0, 100),
            "top_p": (self.top_p, 0, 1),
            "top_k": (self.top_k, 0, 1 << 30),
            "min_p": (self.min_p, 0, 1),
            "repetition_penalty": (self.repetition_penalty, 0.01, 100),
            "repetition_context": (self.repetition_context, 0, 1 << 30),
            "presence_penalty": (self.presence_penalty, -100, 100),
            "frequency_penalty": (self.frequency_penalty, -100, 100),
            "seed": (self.seed or 0, 0, (1 << 64) - 1),
        }
        for name, (value, low, high) in bounds.items():
            if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
                raise InputError(f"{name} must lie between {low} and {high}, not {value!r}")


LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""A function f(ids [n], logits [1, vocab_size]) → logits [1, vocab_size], as mlx-lm has them.

It is called once for each token, in order, with all ids before it: those of the whole prompt,
however much of it was in a cache already, and those of the answer. It may write into the logits.
A `Scheduler` asks once more than the answer has tokens, and drops what comes of it.
"""


class Sampler:
    """Chooses tokens for one request. Each call stays lazy: nothing is read back from the device.

    The n-th token is drawn with a key made of the seed and n alone. So the same tokens come out
    however many are looked at in one pass, which is what makes speculative decoding exact here
    (`m7mlx.speculative`).

    bias        added to the logits of some ids
    processors  functions that change the logits, after bias and penalty (`LogitsProcessor`)
    constraint  what the answer must follow (`m7mlx.constrain`): then each token is read before the
                next is chosen
    logprobs    tell of each token how likely it was, and so many of the likeliest, in `scored`;
                None for neither
    vocab_size  that of the tokenizer: ids from there on, which padded embeddings have, are never
                chosen
    agree       makes of tokens [B] those that are taken, where several processes choose
                (`Mistral.agree`)
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        bias: Mapping[int, float] | None = None,
        processors: Sequence[LogitsProcessor] = (),
        constraint: Constraint | None = None,
        logprobs: int | None = None,
        vocab_size: int | None = None,
        agree: Callable[[mx.array], mx.array] = lambda tokens: tokens,
    ) -> None:
        self.sampling, self._bias, self.constraint = sampling, bias, constraint
        self._logprobs, self._vocab_size, self._agree = logprobs, vocab_size, agree
        self._processors = tuple(processors)
        self.scored: deque[Scored] = deque()  # of the tokens chosen and not yet taken from here
        self._previewed: list[Scored] = []  # by the last `preview`, of tokens that may be chosen
        self._last: mx.array | None = None  # chosen, and not yet told to the constraint
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._seed = random.Random(seed).getrandbits(64)  # far apart for neighbouring seeds
        self._count = 0  # tokens chosen
        self._recent: mx.array | None = None  # ids [≤ repetition_context], the latest last
        self._chosen: mx.array | None = None  # ids [n] of the answer, where a penalty asks for them
        self._ids = mx.array([], mx.int32)  # all of them, where processors want them

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the most probable token, and needs to know nothing else."""
        plain = not self._bias and self.looks_ahead and self._logprobs is None
        return plain and self.sampling.temperature == 0 and self._recent is None and self._chosen is None

    @property
    def looks_ahead(self) -> bool:
        """Whether it may choose a token before it is known that the answer goes on.

        A grammar and processors may keep state, so they are asked for tokens that will come.
        """
        return self.constraint is None and not self._processors

    def see(self, ids: Sequence[int], chosen: int = 0) -> None:
        """Take note of the prompt, whose last `chosen` tokens were chosen earlier on."""
        self._count = chosen
        if self._processors:
            self._ids = mx.array(np.asarray(ids, np.int32))
        context = self.sampling.repetition_context
        if self.sampling.repetition_penalty != 1.0 and context:
            self._recent = mx.array(list(ids[-context:]), dtype=mx.int32)
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self._chosen = mx.array(list(ids[len(ids) - chosen :]), dtype=mx.int32)

    def __call__(self, logits: mx.array) -> mx.array:  # [B, vocab_size] → ids [B], with B = 1
        s, unchanged = self.sampling, logits
        logits = known(logits, self._vocab_size)
        if self._bias:
            ids, values = mx.array(list(self._bias)), mx.array(list(self._bias.values()), logits.dtype)
            logits = mx.array(logits)
            logits[:, ids] += values
        if self._recent is not None:
            logits = penalize(logits, self._recent, s.repetition_penalty)
        if self._chosen is not None and self._chosen.size:
            logits = penalize_chosen(logits, self._chosen, s.presence_penalty, s.frequency_penalty)
        if self._processors:
            logits = self._processed(logits)
        if self.constraint is not None:
            logits = self._constrained(logits)
        if s.temperature == 0:
            token = mx.argmax(logits, axis=-1)
        else:
            key = mx.random.key((self._seed + self._count) % (1 << 64))
            token = mx.random.categorical(filtered_logprobs(logits, s) / s.temperature, key=key)
        token = self._agree(token)
        if self.constraint is not None:
            self._last = token
        if self._logprobs is not None:
            self.scored.append(score_token(unchanged, token, self._logprobs))
        self._advance(token, 1)
        return token

    def _processed(self, logits: mx.array) -> mx.array:
        shape = logits.shape
        logits = mx.array(logits)  # mlx-lm's own processors write into what they are given
        mx.async_eval(self._ids)  # or the graph would grow with each token that nobody looks at
        for process in self._processors:
            logits = process(self._ids, logits)
            if not isinstance(logits, mx.array) or logits.shape != shape:
                given = logits.shape if isinstance(logits, mx.array) else type(logits).__name__
                raise InputError(f"a logits processor must return logits of the shape {shape}, not {given}")
        return logits

    def _constrained(self, logits: mx.array) -> mx.array:
        assert self.constraint is not None
        mx.async_eval(logits)  # under way while the grammar thinks
        if self._last is not None:
            self.constraint.accept(self._last.item())  # type: ignore[arg-type]
        return mx.where(self.constraint.mask(logits.shape[-1]), logits, -mx.inf)

    def preview(self, logits: mx.array, draft: Sequence[int]) -> mx.array:  # [1, L, n] → ids [L]
        """Choose at each of L positions as if the L − 1 ids of `draft` had been chosen before."""
        if self.is_greedy:
            return mx.argmax(known(logits[0], self._vocab_size), axis=-1)
        after, chosen = self.fork(), []
        for i in range(logits.shape[1]):
            chosen.append(after.fork()(logits[:, i]))
            after.accept(draft[i : i + 1])
        if self._logprobs is not None:
            self._previewed = [score_token(logits[:, i], token, self._logprobs) for i, token in enumerate(chosen)]
        return mx.concatenate(chosen)

    def accept(self, ids: Sequence[int]) -> None:
        """Go on as if `ids`, the first that `preview` has found, had been chosen here."""
        self.scored.extend(self._previewed[: len(ids)])
        self._previewed = []
        self._advance(mx.array(list(ids)), len(ids))

    def fork(self) -> Sampler:
        """Make a sampler that goes on from here with the same randomness, without scores."""
        other = copy.copy(self)
        other._logprobs, other.scored, other._previewed = None, deque(), []
        return other

    def _advance(self, tokens: mx.array, count: int) -> None:
        self._count += count
        if self._recent is not None:
            context = self.sampling.repetition_context
            self._recent = mx.concatenate([self._recent, tokens.astype(mx.int32)])[-context:]
        if self._chosen is not None:
            self._chosen = mx.concatenate([self._chosen, tokens.astype(mx.int32)])
        if self._processors:
            self._ids = mx.concatenate([self._ids, tokens.astype(mx.int32)])


def known(logits: mx.array, vocab_size: int | None) -> mx.array:
    """Logits [..., ids] of the ids that a tokenizer of this size has; None keeps all."""
    return logits if vocab_size is None or vocab_size >= logits.shape[-1] else logits[..., :vocab_size]


def filtered_logprobs(logits: mx.array, sampling: Sampling) -> mx.array:
    """Log probabilities [B, vocab_size] in float32, −∞ for the tokens that the filters drop."""
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if 0 < sampling.top_p < 1:
        logprobs = _top_p(logprobs, sampling.top_p)
    if sampling.min_p > 0:
        best = logprobs.max(axis=-1, keepdims=True)
        logprobs = mx.where(logprobs < best + math.log(sampling.min_p), -mx.inf, logprobs)
    if 0 < sampling.top_k < logprobs.shape[-1]:
        kth = mx.partition(logprobs, -sampling.top_k, axis=-1)[..., -sampling.top_k, None]
        logprobs = mx.where(logprobs < kth, -mx.inf, logprobs)
    return logprobs


def _top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Keep tokens whose cumulative probability, from the least probable up, exceeds 1 − top_p."""
    order = mx.argsort(logprobs, axis=-1)
    cumulative = mx.cumsum(mx.take_along_axis(mx.exp(logprobs), order, axis=-1), axis=-1)
    ranks = mx.put_along_axis(
        mx.zeros_like(order), order, mx.arange(order.shape[-1], dtype=order.dtype)[None], axis=-1
    )
    # The most probable token stays whatever rounding says.
    keep = (mx.take_along_axis(cumulative, ranks, axis=-1) > 1 - top_p) | (ranks == order.shape[-1] - 1)
    return mx.where(keep, logprobs, -mx.inf)


def penalize(logits: mx.array, recent: mx.array, penalty: float) -> mx.array:
    """Make the logits of recent ids less likely: the penalty of CTRL (arXiv 1909.05858)."""
    chosen = logits[:, recent]
    chosen = mx.where(chosen < 0, chosen * penalty, chosen / penalty)
    out = mx.array(logits)
    out[:, recent] = chosen
    return out


def penalize_chosen(logits: mx.array, chosen: mx.array, presence: float, frequency: float) -> mx.array:
    """Make ids less likely that an answer holds already: the penalties of OpenAI's API.

    chosen     the ids [n] of the answer so far
    presence   is subtracted from the logits of all of them; frequency, once for each time
    """
    counts = mx.zeros(logits.shape[-1]).at[chosen].add(1.0)
    return logits - (presence * (counts > 0) + frequency * counts).astype(logits.dtype)
