"""Prompt → prefill → decode → text: the road from text to text, over ids (`m7mlx.decode`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, TypedDict, Unpack

import mlx.core as mx
import numpy as np

from m7mlx.cache import RollingCache
from m7mlx.constrain import CUT, Constraint
from m7mlx.decode import decode, default_chunk, prefill, reuse
from m7mlx.errors import InputError, PromptTooLongError, TokenizerError
from m7mlx.memory import positions_that_fit
from m7mlx.model import Mistral
from m7mlx.sampling import Sampler, Sampling
from m7mlx.speculative import DRAFT_SLACK, Drafter, speculate
from m7mlx.tokens.messages import Message
from m7mlx.tokens.tokenizer import Detokenizer, Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]
DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class Stats:
    """What an answer cost. Times are wall clock; speeds are tokens per second.

    prompt_tokens       tokens of the whole prompt, reused_tokens of them already in the cache
    prompt_tps          speed of the prefill of the others
    generated_tokens    tokens generated, the one that ended the answer included
    generation_tps      speed of decoding, from the first token on
    time_to_first_token seconds from the call to the first token
    peak_memory         most bytes MLX held at once during this answer
    cache_bytes         bytes of keys and values allocated
    finish_reason       "stop": end token or stop string; "length": max_tokens or the context
    """

    prompt_tokens: int
    reused_tokens: int
    prompt_tps: float
    generated_tokens: int
    generation_tps: float
    time_to_first_token: float
    peak_memory: int
    cache_bytes: int
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """A piece of the answer: its text, and the ids generated since the piece before. Only the last has stats."""

    text: str
    ids: list[int] = field(default_factory=list)
    stats: Stats | None = None


class Options(TypedDict, total=False):
    """The options of `stream_generate`."""

    cache: RollingCache | None
    drafter: Drafter | None
    sampling: Sampling | None
    max_tokens: int | None
    stop: Sequence[str]
    on_prefill: Callable[[int, int], None] | None
    prefill_chunk: int | None
    continues: Sequence[int]
    constraint: Constraint | None


def generate(model: Mistral, tokenizer: Tokenizer, prompt: Prompt, **options: Unpack[Options]) -> str:
    """The whole answer as text; arguments as for `stream_generate`."""
    return "".join(piece.text for piece in stream_generate(model, tokenizer, prompt, **options))


def stream_generate(
    model: Mistral,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    cache: RollingCache | None = None,
    drafter: Drafter | None = None,
    sampling: Sampling | None = None,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    stop: Sequence[str] = (),
    on_prefill: Callable[[int, int], None] | None = None,
    prefill_chunk: int | None = None,
    continues: Sequence[int] = (),
    constraint: Constraint | None = None,
) -> Generator[Piece, None, None]:
    """Yield the answer to `prompt` piece by piece.

    prompt      a text to continue, a list of ids (an array of MLX or NumPy too), or a list of chat messages (see
                `m7mlx.tokens.messages`), whose contents may be lists of text parts. A last message of the assistant
                with "prefix": True is continued: the answer is what comes after it
    cache       kept from call to call, so that only what is new of the prompt is prefilled; this model's own. A
                generator that is at work with it gives way to a new one, and fails if it is gone on with
    drafter     guesses several tokens at a time, fewer than the cache's slack (`m7mlx.speculative`); the answer
                is the same, only faster
    max_tokens  tokens to generate at most; None goes on until the model ends or its context is full
    stop        texts that end the answer; they are not part of it
    on_prefill  called with (tokens done, tokens to do) before, between and after the chunks; what it raises
                ends the prefill and leaves the cache valid
    constraint  a grammar that the answer follows (`m7mlx.constrain`); not together with a drafter
    continues   ids of an answer that was broken off. It goes on after them, with the same seed as if it had never
                been broken off

    prefill_chunk is the number of tokens read at a time; None takes what is fastest on the backend
    (`m7mlx.decode.default_chunk`). Nothing can be cancelled within a chunk.

    Closing the generator stops within one token; the cache then holds every token that was yielded.

    Raises TokenizerError (ids outside the vocabulary), ChatFormatError, PromptTooLongError, InputError.
    """
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 0):
        raise InputError(f"max_tokens must be a whole number that is not negative, or None, not {max_tokens!r:.100}")
    if prefill_chunk is None:
        prefill_chunk = default_chunk(model)
    if type(prefill_chunk) is not int or prefill_chunk < 1:
        raise InputError(f"prefill_chunk must be a whole number from 1 on, not {prefill_chunk!r:.100}")
    for name, value, kind in (("cache", cache, RollingCache), ("sampling", sampling, Sampling)):
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name} must be a {kind.__name__}, not {_kind(value)}")
    if drafter is not None and (isinstance(drafter, type) or not hasattr(drafter, "draft")):
        raise InputError(f"drafter must be a DraftModel or a PromptLookup(), not {_kind(drafter)}")
    stop_filter = StopFilter(stop)
    ids = [*encode_prompt(tokenizer, prompt), *_ids(continues)]
    begun = _begun(prompt)
    text = tokenizer.detokenizer(at_start=begun is None and not isinstance(prompt, str))
    for token in (*((begun or {}).get("ids") or ()), *continues):
        text.add(token)  # shown already; a character cut in the middle is finished
    if cache is None:
        cache = model.new_cache() if drafter is None else model.new_cache(slack=DRAFT_SLACK)
    cache.bind(model.identity, model.config)
    room = check_prompt(model, ids, cache)
    if model.exchange is not None and drafter is not None:
        raise InputError("a model that is divided among processes is not speculated on")
    if constraint is not None and (drafter is not None or continues):
        raise InputError("an answer that follows a grammar is neither speculated on nor gone on with")
    sampler = Sampler(
        sampling or Sampling(), constraint=constraint, vocab_size=tokenizer.vocab_size, agree=model.agree
    )
    sampler.see(ids, chosen=len(continues))
    limit = room if max_tokens is None else max_tokens if room is None else min(max_tokens, room)
    return _stream(
        model, tokenizer, ids, cache, drafter, sampler, limit, stop_filter, text, on_prefill, prefill_chunk
    )  # fmt: skip


def _stream(
    model: Mistral,
    tokenizer: Tokenizer,
    ids: list[int],
    cache: RollingCache,
    drafter: Drafter | None,
    sampler: Sampler,
    limit: int | None,
    stop: StopFilter,
    text: Detokenizer,
    on_prefill: Callable[[int, int], None] | None,
    chunk: int,
) -> Generator[Piece, None, None]:
    started = time.perf_counter()
    mx.reset_peak_memory()
    cache.user = me = object()
    reused = reuse(cache, ids)
    logits = prefill(model, ids[reused:], cache, chunk, on_prefill)
    count, first_at = 0, time.perf_counter()
    prefilled = first_at - started
    finish: Literal["stop", "length"] = "length"
    pending: list[int] = []
    last = ""
    decoded = (
        decode(model, logits, cache, sampler, limit)
        if drafter is None
        else speculate(model, logits, cache, sampler, limit, drafter)
    )
    for token in decoded:
        count += 1
        if count == 1:
            first_at = time.perf_counter()
        pending.append(token)
        if token in tokenizer.eos_ids:
            finish = "stop"
            break
        shown = stop.add(text.add(token))
        if stop.found:
            if sampler.constraint is not None and sampler.constraint.enforced:
                decoded.close()
                raise InputError(CUT)
            finish, last = "stop", shown
            break
        if shown:
            yield Piece(shown, pending)
            pending = []
            if cache.user is not me:
                raise InputError("another answer was begun with this cache; give each a cache of its own")
    now = time.perf_counter()
    decoded.close()  # what was drafted beyond the end leaves the cache
    stats = Stats(
        prompt_tokens=len(ids),
        reused_tokens=reused,
        prompt_tps=(len(ids) - reused) / max(prefilled, 1e-9),
        generated_tokens=count,
        generation_tps=(count - 1) / max(now - first_at, 1e-9) if count > 1 else 0.0,
        time_to_first_token=first_at - started,
        peak_memory=mx.get_peak_memory(),
        cache_bytes=cache.nbytes,
        finish_reason=finish,
    )
    yield Piece(last + stop.finish(text.finish()), pending, stats)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Ids of a prompt in any of its three forms."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_bos=tokenizer.add_bos)
    if isinstance(prompt, Mapping):
        raise InputError("a message stands in a list: [{'role': …, 'content': …}]")
    if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
        return tokenizer.chat.encode([_joined(message) for message in prompt])
    return _ids(prompt)


def _begun(prompt: Prompt) -> Message | None:
    """The message of a prompt that the model continues, if there is one."""
    last = prompt[-1] if isinstance(prompt, Sequence) and len(prompt) else None
    return last if isinstance(last, Mapping) and last.get("prefix") else None


def _ids(given: Any) -> list[int]:
    """Token ids from a list or an array of one conversation."""
    if isinstance(given, mx.array | np.ndarray):
        given = given[0] if given.ndim == 2 and len(given) == 1 else given
        given = given.tolist() if given.ndim == 1 else None
    is_list = isinstance(given, Iterable) and not isinstance(given, bytes | bytearray | memoryview | str)
    ids: list[Any] = list(given) if is_list else [None]
    if not all(isinstance(i, Integral) for i in ids) or any(isinstance(i, bool) for i in ids):
        raise InputError("a prompt is a text, a list of ids or a list of messages")
    return [int(i) for i in ids]


def _joined(message: Any) -> Any:
    """A message whose content, if it is a list of text parts, is their text."""
    parts = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(parts, list):
        return message
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise InputError("the parts of a message must be of type text: this model reads nothing else")
    return {**message, "content": "".join(texts)}  # type: ignore[arg-type]


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_prompt(model: Mistral, ids: Sequence[int], cache: RollingCache) -> int | None:
    """How many tokens may follow the prompt; None where a window lets the sequence go on for ever."""
    config = model.config
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    found = np.asarray(ids)  # without a copy of those that a server reads
    beyond = np.flatnonzero((found < 0) | (found >= config.vocab_size))
    if beyond.size:  # it would read memory that is not the model's
        token = ids[int(beyond[0])]
        raise TokenizerError(f"token id {token} is outside the model's vocabulary of {config.vocab_size}")
    if cache.window is not None:
        return None
    bits = cache.format.stored_bits(model.dtype)
    fit, context = positions_that_fit(config, model.nbytes, bits), config.max_position_embeddings
    if len(ids) > min(fit, context):
        what = f"the model's context holds {context}" if context <= fit else f"memory holds {fit} beside the model"
        raise PromptTooLongError(
            f"the prompt has {len(ids)} tokens, but {what}; "
            "shorten it, start a new conversation, or bound the cache with max_kv_size"
        )
    return min(fit, context) - len(ids)


class StopFilter:
    """Cuts a stream at the first of several texts to be whole, which may lie across the borders of its pieces.

    However many there are and however alike, each letter costs each of them a step or two (Knuth, Morris, Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises InputError for what is no list of texts."""
        if (
            not isinstance(stops, Sequence)
            or isinstance(stops, str)
            or not all(s and isinstance(s, str) for s in stops)
        ):
            raise InputError("stop must be a list of texts, none of them empty")
        self._searches = [_Search(stop) for stop in stops]
        self._held = ""  # could be the beginning of a stop text
        self.found = False

    def add(self, text: str) -> str:
        """What of the stream so far, with `text`, can be shown."""
        before, self._held = len(self._held), self._held + text
        for end, letter in enumerate(text, before + 1):
            whole = [search.length for search in self._searches if search.see(letter)]
            if whole:
                self.found = True
                shown, self._held = self._held[: end - max(whole)], ""
                return shown
        unsure = max((search.begun for search in self._searches), default=0)
        shown_to = len(self._held) - unsure
        shown, self._held = self._held[:shown_to], self._held[shown_to:]
        return shown

    def finish(self, text: str) -> str:
        """The rest, once the stream has ended."""
        return "" if self.found else self.add(text) + self._held


class _Search:
    """Looks for one text letter by letter; `begun` of its letters are the last that were seen."""

    def __init__(self, text: str) -> None:
        self._text, self.length, self.begun = text, len(text), 0
        self._shorter = [0]  # the longest beginning of the text that ends its first letter, its first two, …
        for letter in text[1:]:
            self._shorter.append(self._longer(self._shorter[-1], letter))

    def see(self, letter: str) -> bool:
        """Whether this letter makes it whole."""
        self.begun = self._longer(self.begun, letter)
        return self.begun == self.length

    def _longer(self, begun: int, letter: str) -> int:
        while begun and self._text[begun] != letter:
            begun = self._shorter[begun - 1]
        return begun + (self._text[begun] == letter)
