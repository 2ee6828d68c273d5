"""Prompt → prefill → decode → text: the road from text to text, over ids (`m7mlx.decode`)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TypedDict, Unpack, cast, overload

import mlx.core as mx

from m7mlx.answer import Answer, Piece
from m7mlx.batch_generation import Prompts, generate_all, is_several
from m7mlx.cache import RollingCache, Snapshot
from m7mlx.constrain import Constraint
from m7mlx.decode import decode, default_chunk, prefill, reuse
from m7mlx.errors import InputError
from m7mlx.model import Mistral
from m7mlx.prompt import Prompt
from m7mlx.request import DEFAULT_MAX_TOKENS, Request, kind_of, prepare
from m7mlx.sampling import LogitsProcessor, Sampling
from m7mlx.speculative import DRAFT_SLACK, Drafter, speculate
from m7mlx.tokens.tokenizer import Tokenizer


class Options(TypedDict, total=False):
    """The options of `stream_generate`."""

    cache: RollingCache | None
    drafter: Drafter | None
    sampling: Sampling | None
    max_tokens: int | None
    stop: Sequence[str]
    on_prefill: Callable[[int, int], None] | None
    prefill_chunk: int | None
    continues: Sequence[int] | str
    constraint: Constraint | None
    logprobs: int | None
    logits_processors: Sequence[LogitsProcessor]


@overload
def generate(model: Mistral, tokenizer: Tokenizer, prompt: Prompt, **options: Unpack[Options]) -> str: ...


@overload
def generate(model: Mistral, tokenizer: Tokenizer, prompt: Prompts, **options: Unpack[Options]) -> list[str]: ...


def generate(
    model: Mistral, tokenizer: Tokenizer, prompt: Prompt | Prompts, **options: Unpack[Options]
) -> str | list[str]:
    """Return the whole answer as text; arguments as for `stream_generate`.

    A list of prompts gives the list of their answers, made side by side. That is a list whose first
    item is a text or itself a list; a list of numbers is the ids of one prompt, a list of messages
    one conversation. Each answer is the one that its prompt gets alone, up to the rounding of a
    pass over several rows. A cache, a drafter and whatever else belongs to one answer cannot be
    given with a list; logits processors see all prompts in turn, so none may keep state.
    """
    if is_several(prompt):
        return generate_all(model, tokenizer, prompt, options)
    one = cast(Prompt, prompt)
    return "".join(piece.text for piece in stream_generate(model, tokenizer, one, **options))


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
    continues: Sequence[int] | str = (),
    constraint: Constraint | None = None,
    logprobs: int | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
) -> Generator[Piece, None, None]:
    """Yield the answer to `prompt` piece by piece.

    prompt      a text to go on with, a list of ids (an array of MLX or NumPy too), or a list of
                chat messages (see `m7mlx.tokens.messages`), whose contents may be lists of text
                parts. A last message of the assistant with "prefix": True is continued: the answer
                is what comes after it
    cache       kept from call to call, so that only what is new of the prompt is prefilled; this
                model's own. A generator that is at work with it gives way to a new one, and fails
                if it is asked for more
    drafter     guesses several tokens at a time, fewer than the cache's slack
                (`m7mlx.speculative`); the answer is the same, only faster
    sampling    how each token is chosen; None takes the most probable
    max_tokens  tokens to generate at most; None goes on until the model ends or its context is full
    stop        texts that end the answer; they are not part of it
    on_prefill  called with (tokens done, tokens to do) before, between and after the chunks; what
                it raises ends the prefill and leaves the cache valid
    continues   ids, or the text, of an answer that was broken off. It goes on after them, with the
                same seed as if it had never been broken off
    constraint  a grammar that the answer follows (`m7mlx.constrain`); not together with a drafter,
                nor with an answer or message that is continued
    logprobs    tell in `piece.logprobs` how likely each token was, and so many of the likeliest in
                its place
    logits_processors
                functions f(ids, logits) → logits, as for mlx-lm (`m7mlx.sampling.LogitsProcessor`);
                not together with a drafter

    prefill_chunk is the number of tokens read at a time; None takes what is fastest on the backend
    (`m7mlx.decode.default_chunk`). Nothing can be cancelled within a chunk.

    Closing the generator stops within one token; the cache then holds every token that was yielded.

    Raises TokenizerError (ids outside the vocabulary), ChatFormatError, PromptTooLongError,
    InputError.
    """
    request = Request(
        prompt,
        Sampling() if sampling is None else sampling,
        max_tokens,
        stop,
        continues=continues,
        logprobs=logprobs,
        logits_processors=logits_processors,
        constraint=constraint,
    )
    if cache is None:
        cache = model.new_cache() if drafter is None else model.new_cache(slack=DRAFT_SLACK)
    elif not isinstance(cache, RollingCache):
        raise InputError(f"cache must be a RollingCache, not {kind_of(cache)}")
    request = prepare(request, model, tokenizer, cache)
    return stream_answer(
        model, tokenizer, request, cache, drafter=drafter, on_prefill=on_prefill, prefill_chunk=prefill_chunk
    )


def stream_answer(
    model: Mistral,
    tokenizer: Tokenizer,
    request: Request,
    cache: RollingCache,
    *,
    drafter: Drafter | None = None,
    snapshots: Iterable[Snapshot] = (),
    on_prefill: Callable[[int, int], None] | None = None,
    prefill_chunk: int | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Generator[Piece, None, None]:
    """Yield the answer to a request that `m7mlx.request.prepare` has made ready, piece by piece.

    snapshots     where more of the prompt may be held than in the cache (`m7mlx.decode.reuse`)
    is_cancelled  asked between chunks and after each token whether to end; the last piece then says
                  "cancelled"

    The other options are those of `stream_generate`.

    Raises InputError.
    """
    chunk = default_chunk(model) if prefill_chunk is None else prefill_chunk
    if type(chunk) is not int or chunk < 1:
        raise InputError(f"prefill_chunk must be a whole number from 1 on, not {chunk!r:.100}")
    if drafter is not None:
        _check_drafter(drafter, model, request)
    cache.bind(model.identity, model.config)
    answer = Answer(request, model, tokenizer)

    def on_chunk(done: int, total: int) -> None:
        if is_cancelled():
            raise _CancelledError
        if on_prefill is not None:
            on_prefill(done, total)

    def tokens() -> Generator[int, None, None]:
        logits = prefill(model, answer.ids[cache.offset :], cache, chunk, on_chunk)
        answer.read()
        if drafter is None:
            return decode(model, logits, cache, answer.sampler, request.max_tokens)
        return speculate(model, logits, cache, answer.sampler, request.max_tokens, drafter)

    return _pieces(answer, cache, snapshots, tokens, is_cancelled)


class _CancelledError(Exception):
    """Ends a prefill that nobody wants any more."""


def _pieces(
    answer: Answer,
    cache: RollingCache,
    snapshots: Iterable[Snapshot],
    tokens: Callable[[], Generator[int, None, None]],
    is_cancelled: Callable[[], bool],
) -> Generator[Piece, None, None]:
    mx.reset_peak_memory()
    cache.user = me = object()
    answer.begin(cache, reuse(cache, answer.ids, snapshots))
    try:
        decoded = tokens()
    except _CancelledError:
        yield answer.end("cancelled")
        return
    untold: list[Piece] = []
    with closing(decoded):  # what was drafted beyond the end leaves the cache
        for token in decoded:
            untold.append(answer.take(token))
            if untold[-1].finish_reason is not None:
                break
            if answer.is_due(untold[-1]):
                yield _joined(untold)
                untold = []
                if cache.user is not me:
                    raise InputError("another answer was begun with this cache; give each a cache of its own")
            if is_cancelled():
                untold.append(answer.end("cancelled"))
                break
        else:  # no token was wanted
            untold.append(answer.end("length"))
    error = untold[-1].error
    if error is not None:
        # Its traceback holds this frame, which must not hold it: the cache would outlive its users.
        del untold
        try:
            raise error
        finally:
            del error
    yield _joined(untold)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """Join pieces of which only the last has something to show, or ends the answer."""
    if len(pieces) == 1:
        return pieces[0]
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        thought="".join(piece.thought for piece in pieces),
        ids=[token for piece in pieces for token in piece.ids],
        logprobs=[one for piece in pieces for one in piece.logprobs],
    )


def _check_drafter(drafter: Drafter, model: Mistral, request: Request) -> None:
    if isinstance(drafter, type) or not hasattr(drafter, "draft"):
        raise InputError(f"drafter must be a DraftModel or a PromptLookup(), not {kind_of(drafter)}")
    if model.exchange is not None:
        raise InputError("a model that is divided among processes is not speculated on")
    if request.has_grammar:
        raise InputError("an answer that follows a grammar cannot be drafted; leave out the drafter")
    if request.logits_processors:
        raise InputError("an answer with logits_processors cannot be drafted; leave out the drafter")
