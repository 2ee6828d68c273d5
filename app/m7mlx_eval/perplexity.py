"""Perplexity of texts, and the distance of two models on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from m7mlx.cache import RollingCache
from m7mlx.errors import InputError
from m7mlx.memory import positions_that_fit
from m7mlx.model import Mistral
from m7mlx.scoring import Span, compare, score, spans
from m7mlx.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reading:
    """The way to read texts.

    context     tokens of a span that is read at once; None streams each text through the rolling
                cache
    stride      tokens that spans advance by; None takes half a span, so that each token is scored
                after at least so many
    max_tokens  tokens of all texts together
    kv_bits     of the model's keys and values, not of a reference's; None takes the default
    """

    context: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    kv_bits: int | None = None

    def cache(self, model: Mistral) -> RollingCache:
        """An empty cache. Raises InputError for bits that do not fit the model."""
        return model.new_cache(kv_bits=self.kv_bits)


@dataclass
class Mean:
    """A mean over tokens, and its standard error as if they were independent; no value is kept."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = -math.inf

    def add(self, values: np.ndarray) -> None:
        """Take more values."""
        wide = values.astype(np.float64)
        self.count += wide.size
        self.total += float(wide.sum())
        self.squares += float(np.square(wide).sum())
        self.largest = max(self.largest, float(wide.max()))

    @property
    def mean(self) -> float:
        """The mean of all values."""
        return self.total / self.count

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN for a single value."""
        if self.count < 2:
            return math.nan
        variance = max(0.0, self.squares - self.total**2 / self.count) / (self.count - 1)
        return math.sqrt(variance / self.count)


@dataclass
class Result:
    """The figures found; logarithms are natural.

    spans      that were read at once
    nbytes     of the text that the scored tokens stand for, in UTF-8
    loss       −log p of each token scored

    Empty without a reference:

    reference  the reference's losses
    kl         KL(reference ‖ model)
    agrees     whether both find the same token the likeliest
    """

    documents: int = 0
    spans: int = 0
    nbytes: int = 0
    loss: Mean = field(default_factory=Mean)
    reference: Mean = field(default_factory=Mean)
    kl: Mean = field(default_factory=Mean)
    agrees: Mean = field(default_factory=Mean)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as `--json` writes them."""
        found: dict[str, Any] = {
            "documents": self.documents,
            "tokens": self.loss.count,
            "bytes": self.nbytes,
            "windows": self.spans,
            **self._likelihood(self.loss),
        }
        if self.kl.count:
            found["reference"] = self._likelihood(self.reference)
            found["kl"] = {"mean": self.kl.mean, "stderr": self.kl.error, "max": self.kl.largest}
            found["top1_agreement"] = {"mean": self.agrees.mean, "stderr": self.agrees.error}
        return found

    def _likelihood(self, loss: Mean) -> dict[str, float]:
        perplexity = math.exp(loss.mean)
        return {
            "loss": loss.mean,
            "loss_stderr": loss.error,
            "perplexity": perplexity,
            "perplexity_stderr": perplexity * loss.error,
            "bits_per_byte": loss.total / math.log(2) / self.nbytes if self.nbytes else math.nan,
        }


def evaluate(
    model: Mistral,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    reading: Reading,
    *,
    reference: Mistral | None = None,
    note: Callable[[str], None] = lambda text: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Result:
    """Score every token of the texts, each read by itself.

    reference  a model to compare with on the same tokens
    note       is told what was decided for the user
    advance    is called with each count of tokens read

    Raises InputError where there is nothing to score, or two models cannot be compared;
    PromptTooLongError.
    """
    both = [model, *([reference] if reference else [])]
    result, told = Result(), False
    for ids in _encode(texts, tokenizer, reading.max_tokens):
        context, stride = _choose_context(both, reading, len(ids))
        if context != reading.context and not told:
            told = True
            note(f"texts beyond the model's context are read in windows of {context:,} that advance by {stride:,}")
        for span in spans(len(ids), context, stride):
            _add(result, both, ids, span, reading, advance)
        result.documents += 1
        result.nbytes += len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:1]).encode())
    if not result.documents:
        raise InputError("there is nothing to score; give a text of at least two tokens")
    return result


def _add(
    result: Result,
    both: Sequence[Mistral],
    ids: list[int],
    span: Span,
    reading: Reading,
    advance: Callable[[int], None],
) -> None:
    """Score a span of a text, and add what is found to the result."""
    part, first = ids[span.start : span.end], span.first - span.start
    result.spans += 1
    if len(both) == 1:
        result.loss.add(-score(both[0], part, first, reading.cache(both[0]), advance).logprobs)
        return
    model, reference = both
    found = compare(model, reference, part, first, (reading.cache(model), reference.new_cache()), advance)
    result.loss.add(-found.logprobs)
    result.reference.add(-found.reference)
    result.kl.add(found.kl)
    result.agrees.add(found.agrees)


def _encode(texts: Iterable[str], tokenizer: Tokenizer, limit: int | None) -> Iterator[list[int]]:
    """Yield the ids of each text of two tokens or more, with a start token if the model has one.

    limit  tokens of all texts together
    """
    for text in texts:
        ids = tokenizer.encode(text, add_bos=tokenizer.add_bos)[:limit]
        if len(ids) >= 2:
            yield ids
        if limit is not None:
            limit -= len(ids)
            if limit < 2:
                return


def _choose_context(both: Sequence[Mistral], reading: Reading, length: int) -> tuple[int | None, int | None]:
    """Return context and stride for a text: as asked for, or where a model's own context ends."""
    most = min((n for model in both if (n := longest(model, reading)) is not None), default=None)
    context, stride = reading.context, reading.stride
    if most is not None:
        if context is not None and context > most:
            raise InputError(f"--context {context} is more than the {most:,} tokens that the model sees at most")
        if context is None and length - 1 > most:
            context = most
    if context is not None and stride is None:
        stride = max(1, context // 2)
    return context, stride


def longest(model: Mistral, reading: Reading) -> int | None:
    """Return the tokens that can be read at once; None where a window lets a text go on."""
    if model.config.window is not None:
        return None
    bits = reading.cache(model).format.stored_bits(model.dtype)
    return min(model.config.max_position_embeddings, positions_that_fit(model.config, model.nbytes, bits))
