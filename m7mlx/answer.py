"""One answer on its way: tokens go in, pieces and what they cost come out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx

from m7mlx.cache import RollingCache
from m7mlx.constrain import CUT
from m7mlx.errors import InputError
from m7mlx.logprobs import TokenLogprobs, score_given
from m7mlx.model import Mistral
from m7mlx.request import Request
from m7mlx.sampling import Sampler
from m7mlx.tokens.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class Stats:
    """What an answer cost. Times are wall clock; speeds are tokens per second.

    prompt_tokens       tokens of the whole prompt, reused_tokens of them already in a cache
    prompt_tps          speed of the prefill of the others; 0 where it was broken off
    generated_tokens    tokens generated, the one that ended the answer included
    generation_tps      speed of decoding, from the first token on
    time_to_first_token seconds from the call (or `Scheduler.add`) to the first token, or to an end
                        before it
    peak_memory         most bytes MLX held at once: since the call; with a scheduler since the
                        process began
    cache_bytes         bytes of keys and values allocated; 0 with a scheduler, whose answers share
                        them
    accepted_prediction tokens that were taken from the request's prediction and were right, with a
                        scheduler that drafts; rejected_prediction, that were wrong
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_tps: float = 0.0
    generated_tokens: int = 0
    generation_tps: float = 0.0
    time_to_first_token: float = 0.0
    peak_memory: int = 0
    cache_bytes: int = 0
    accepted_prediction: int = 0
    rejected_prediction: int = 0


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; its last one says how it ended.

    text           what can be shown now
    thought        what the model thought, which is not part of the answer
    ids            the tokens generated since the piece before
    stats          what the answer cost; only the last piece has it
    logprobs       log probabilities of `ids`, where the request asks for them
    prompt         log probabilities of the prompt's next tokens, from its second on, where the
                   request asks for them
    stop           of the last piece: the stop text that ended the answer, if one did
    finish_reason  of the last piece. "stop": an end token or a stop text; "length": max_tokens or
                   the context; "cancelled": nobody wants it any more; "failed": `error` says why
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    stats: Stats | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt: list[TokenLogprobs] = field(default_factory=list)
    stop: str | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    thought: str = ""


class Answer:
    """Makes pieces of the tokens that its sampler chooses for a request (`m7mlx.request.prepare`).

    A token that parts the answer (`Tokenizer.marks`), such as [TOOL_CALLS], is the last id of its
    piece, and the text of that piece stands before it.

    ids       all that is read before the first token
    cache     the one that its prompt is read into, as long as it is this answer's alone
    accepted  tokens that were taken from its prediction and were right; rejected, that were wrong
    """

    def __init__(self, request: Request, model: Mistral, tokenizer: Tokenizer) -> None:
        self.request, self.ids = request, request.ids
        self.cache: RollingCache | None = None
        self.sampler = Sampler(
            request.sampling,
            bias=request.logit_bias,
            constraint=request.constraint,
            processors=request.logits_processors,
            logprobs=request.logprobs,
            vocab_size=tokenizer.vocab_size,
            agree=model.agree,
        )
        self.sampler.see(self.ids, chosen=len(request.continues))
        self._tokenizer, self._thinks = tokenizer, False
        self._text, self._stop = tokenizer.detokenizer(request.at_start), StopFilter(request.stop)
        for token in self.ids[len(self.ids) - len(request.continues) - request.begun :]:
            self._text.add(token)  # shown already; a character cut in the middle is finished
            self._part(token)
        self._eos = tokenizer.eos_ids
        self.accepted = self.rejected = 0
        self._reused = self._count = 0
        self._started = self._reading = time.perf_counter()
        self._read = self._first = 0.0

    @property
    def left(self) -> int | None:
        """How many tokens it may still have; None for any number."""
        return None if self.request.max_tokens is None else self.request.max_tokens - self._count

    def begin(self, cache: RollingCache, reused: int) -> None:
        """Note that the prompt will now be read into `cache`, which holds `reused` tokens of it."""
        self.cache, self._reused, self._reading = cache, reused, time.perf_counter()

    def read(self) -> None:
        """Note that the prompt has been read."""
        self._read = time.perf_counter()

    def score(self, logits: mx.array, position: int) -> list[TokenLogprobs]:
        """Score what follows in the prompt, by logits [L, vocab_size] of L positions of it."""
        following = self.ids[position + 1 : position + 1 + logits.shape[0]]
        return score_given(logits, following, self.request.prompt_logprobs or 0) if len(following) else []

    def take(self, token: int) -> Piece:
        """Make a piece of one more token; its text is empty where nothing can be shown yet."""
        self._count += 1
        self._first = self._first or time.perf_counter()
        logprobs = [self.sampler.scored.popleft().read()] if self.sampler.scored else []
        if token in self._eos:
            return self.end("stop", "", [token], logprobs)
        thought, text = self._told(token)
        if self._stop.found:
            constraint = self.request.constraint
            if constraint is not None and constraint.is_whole:
                return self.fail(InputError(CUT))
            return self.end("stop", text, [token], logprobs)
        if self._count == self.request.max_tokens:
            return self.end("length", text, [token], logprobs, thought=thought)
        return Piece(text, [token], None, logprobs, thought=thought)

    def is_due(self, piece: Piece) -> bool:
        """Whether a piece must be told by itself: it shows something, or parts the answer."""
        return bool(piece.text or piece.thought or piece.ids[-1] in self._tokenizer.marks)

    def _told(self, token: int) -> tuple[str, str]:
        """Return what a token makes of thought and of text."""
        if token in self._tokenizer.marks:  # what was held back stands before it
            thinks, rest = self._thinks, self._text.finish()
            self._part(token)
            if thinks:
                return rest, ""
            text = self._stop.finish(rest)
            self._stop = self._stop if self._stop.found else StopFilter(self.request.stop)
            return "", text
        text = self._text.add(token)
        return (text, "") if self._thinks else ("", self._stop.add(text))

    def _part(self, token: int) -> None:
        """Begin another part of the answer if `token` says so."""
        name = self._tokenizer.marks.get(token)
        if name is not None:
            self._text = self._tokenizer.detokenizer()
            self._thinks = name == "[THINK]" or (self._thinks and name != "[/THINK]")

    def end(
        self,
        reason: FinishReason,
        text: str = "",
        ids: Sequence[int] = (),
        logprobs: Sequence[TokenLogprobs] = (),
        error: Exception | None = None,
        thought: str = "",
    ) -> Piece:
        """Make the last piece. It shows what was held back for fear of a stop text.

        A character that the answer was cut in is not shown if it is cancelled: it may go on.
        """
        if self.request.constraint is not None:
            self.request.constraint.close()
        if reason != "failed":
            rest = "" if reason == "cancelled" else self._text.finish()
            thought += rest if self._thinks else ""
            text += self._stop.finish("" if self._thinks else rest)
        return Piece(
            text,
            list(ids),
            self._stats(),
            list(logprobs),
            stop=self._stop.found_text,
            finish_reason=reason,
            error=error,
            thought=thought,
        )

    def fail(self, error: Exception) -> Piece:
        """Make the last piece of an answer that cannot go on."""
        return self.end("failed", error=error)

    def _stats(self) -> Stats:
        now = time.perf_counter()
        return Stats(
            prompt_tokens=len(self.ids),
            reused_tokens=self._reused,
            prompt_tps=(len(self.ids) - self._reused) / max(self._read - self._reading, 1e-9) if self._read else 0.0,
            generated_tokens=self._count,
            generation_tps=(self._count - 1) / max(now - self._first, 1e-9) if self._count > 1 else 0.0,
            time_to_first_token=(self._first or now) - self._started,
            peak_memory=mx.get_peak_memory(),
            cache_bytes=0 if self.cache is None else self.cache.nbytes,
            accepted_prediction=self.accepted,
            rejected_prediction=self.rejected,
        )


class StopFilter:
    """Cuts a stream at the first of several texts to be whole, across the borders of its pieces.

    However many there are and however alike, each letter costs each of them a step or two (Knuth,
    Morris, Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Make a filter for the texts `stops`, none of them empty."""
        self._searches = [_Search(stop) for stop in stops]
        self._held = ""  # could be the beginning of a stop text
        self.found = False
        self.found_text: str | None = None  # the longest of those that were whole at once

    def add(self, text: str) -> str:
        """Take more of the stream; return what of it can be shown now."""
        before, self._held = len(self._held), self._held + text
        for end, letter in enumerate(text, before + 1):
            whole = [search.text for search in self._searches if search.see(letter)]
            if whole:
                self.found, self.found_text = True, max(whole, key=len)
                shown, self._held = self._held[: end - len(self.found_text)], ""
                return shown
        unsure = max((search.begun for search in self._searches), default=0)
        shown_to = len(self._held) - unsure
        shown, self._held = self._held[:shown_to], self._held[shown_to:]
        return shown

    def finish(self, text: str) -> str:
        """Take the last of the stream; return the rest that can be shown."""
        return "" if self.found else self.add(text) + self._held


class _Search:
    """Looks for one text letter by letter; `begun` of its letters are the last that were seen."""

    def __init__(self, text: str) -> None:
        self.text, self.begun = text, 0
        # By letters seen: the longest beginning of the text that they also end with.
        self._shorter = [0]
        for letter in text[1:]:
            self._shorter.append(self._longer(self._shorter[-1], letter))

    def see(self, letter: str) -> bool:
        """Take one more letter; return whether it makes the text whole."""
        self.begun = self._longer(self.begun, letter)
        return self.begun == len(self.text)

    def _longer(self, begun: int, letter: str) -> int:
        while begun and self.text[begun] != letter:
            begun = self._shorter[begun - 1]
        return begun + (self.text[begun] == letter)
