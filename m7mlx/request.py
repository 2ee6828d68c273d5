"""What a client asks of the scheduler, what becomes of it, and one answer on its way between the two."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from weakref import WeakKeyDictionary

from m7mlx.cache import RollingCache
from m7mlx.constrain import CUT, Constraint
from m7mlx.decode import shared_start
from m7mlx.errors import InputError
from m7mlx.generation import StopFilter
from m7mlx.model import Mistral
from m7mlx.sampling import Sampler, Sampling, TokenScores
from m7mlx.tokens.tokenizer import Tokenizer

Reason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class Request:
    """A prompt, and how to answer it; options as for `m7mlx.stream_generate`.

    at_start    whether the answer begins a message (chat), not the middle of a text
    logit_bias, logprobs, constraint  as for `m7mlx.sampling.Sampler`
    """

    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = 512
    stop: Sequence[str] = ()
    at_start: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Event:
    """What has become of a request: more of its answer, or its end.

    request  the number that `Scheduler.add` gave
    text     what can be shown since the event before; ids, the tokens generated since then; scores, theirs
    reason   None as long as it goes on; "failed" has an error
    """

    request: int
    text: str = ""
    ids: tuple[int, ...] = ()
    scores: tuple[TokenScores, ...] = ()
    reason: Reason | None = None
    error: Exception | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, how many of them were held already, and tokens generated; seconds from `add` on."""

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    first_token: float
    whole: float


class Answer:
    """One request on its way."""

    def __init__(
        self, number: int, request: Request, limit: int | None, model: Mistral, tokenizer: Tokenizer
    ) -> None:
        self.number, self.limit = number, limit
        self.ids = request.ids
        self._constraint = request.constraint
        self.alike: WeakKeyDictionary[Answer | RollingCache, int] = WeakKeyDictionary()
        self.sampler = Sampler(
            request.sampling,
            bias=request.logit_bias,
            constraint=request.constraint,
            logprobs=request.logprobs,
            vocab_size=tokenizer.vocab_size,
            agree=model.agree,
        )
        self.sampler.see(self.ids)
        self.text, self.stop = tokenizer.detokenizer(request.at_start), StopFilter(request.stop)
        self.eos = tokenizer.eos_ids
        self.cache: RollingCache | None = None  # as long as the prompt is being read
        self.reused = self.generated = 0
        self.added = time.perf_counter()
        self.first = 0.0
        self.error: Exception | None = None  # its grammar has failed

    def shares(self, other: Answer | RollingCache) -> int:
        """How many ids its prompt and another, or a conversation that has ended, begin with alike.

        It is looked at before each step, and neither changes: a million ids are compared once.
        """
        if other not in self.alike:
            self.alike[other] = shared_start(self.ids, other.ids)
        return self.alike[other]

    def take(self, token: int) -> Event:
        """The event of one more token."""
        scores = (self.sampler.scores.popleft().read(),) if self.sampler.scores else ()
        return replace(self._taken(token), scores=scores)

    def _taken(self, token: int) -> Event:
        self.generated += 1
        self.first = self.first or time.perf_counter()
        if token in self.eos:
            return self.end("stop", ids=(token,))
        shown = self.stop.add(self.text.add(token))
        if self.stop.found:
            if self._constraint is not None and self._constraint.enforced:
                self.error = self.error or InputError(CUT)
            return self.end("stop", shown, (token,))
        if self.generated == self.limit:
            return self.end("length", shown, (token,))
        return Event(self.number, shown, (token,))

    def end(self, reason: Reason, text: str = "", ids: tuple[int, ...] = (), error: Exception | None = None) -> Event:
        now = time.perf_counter()
        usage = Usage(
            prompt_tokens=len(self.ids),
            reused_tokens=self.reused,
            generated_tokens=self.generated,
            first_token=(self.first or now) - self.added,
            whole=now - self.added,
        )
        if self._constraint is not None:
            self._constraint.close()
        shown = text if reason == "failed" else text + self.stop.finish(self.text.finish())
        return Event(self.number, shown, ids, reason=reason, error=error, usage=usage)

    def fail(self, error: Exception) -> Event:
        """Its last event, where it cannot go on."""
        return self.end("failed", error=error)
