"""Several tokens from one forward pass: a cheap guess at what follows, checked by the model itself.

A draft is written into the ring behind the last token, all of it is looked at in one pass, and what
the model would not have chosen is rolled back; the slack makes room for it, before and after the
ring has turned.

Exact by construction. At every position the model's own choice is drawn, with the randomness that
this position has in plain decoding too, and a draft's token is kept if it is that choice. The first
that is not is replaced by it. So the tokens are those of plain decoding, greedy or sampled,
whatever the draft was: for a draft without probabilities this is rejection sampling (a token x
survives with probability p(x), and what replaces it follows p without x); a draft model draws from
its own distribution with the same noise, which makes both agree often (the Gumbel coupling of arXiv
2408.07978). Numbers that differ in the last bits between one and several queries can turn a near
tie the other way.
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Generator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from m7mlx.cache import RollingCache
from m7mlx.decode import default_chunk, prefill, reuse
from m7mlx.errors import InputError, RollbackError
from m7mlx.loading import load
from m7mlx.memory import planned_length
from m7mlx.model import Mistral
from m7mlx.pace import MAX_DRAFT, Pace
from m7mlx.sampling import Sampler
from m7mlx.tokens.tokenizer import Tokenizer

DRAFT_SLACK = 2 * (MAX_DRAFT + 1)  # a draft, and what a longer one before it has left behind


class Drafter(Protocol):
    """Guesses what follows. `pace` decides how much is worth a try, and learns between answers."""

    pace: Pace

    def begin(self, ids: Sequence[int]) -> None:
        """Begin an answer after these tokens."""

    def promising(self, ids: Sequence[int]) -> bool:
        """Whether waiting for the token after `ids` is worth it; must cost next to nothing."""

    def draft(self, ids: Sequence[int], token: int, most: int, sampler: Sampler) -> list[int]:
        """Draft up to `most` tokens to follow `ids` and `token`; `sampler` will choose the first.

        Between `begin` and the last call, `ids` only grows, by the token given here first.
        """


class PromptLookup:
    """Finds where the last few tokens stood before, and guesses that the same follows.

    That is so in quotes, edits and repairs. Where a copy departs from its source (a word changed, a
    comma put in), two tokens are enough to find back to it.

    predicted  how many tokens at the beginning of the last draft were taken from the prediction
    """

    _SIZES = (12, 6, 3)  # tokens that must match; the longest match is the surest
    _NEAR = 12  # tokens around the source where a departed copy is looked for, for as many tokens

    def __init__(self, prediction: Sequence[int] = ()) -> None:
        """Make a drafter that looks up the prompt, the answer so far, and what is predicted of it.

        prediction  tokens that the answer may be made of, most of them in this order
        """
        self.pace = Pace()
        self.predicted = 0
        self._prediction = list(prediction)
        # What is searched: the prompt, the prediction behind it as if it had been the answer, the
        # prompt's end again, and the answer.
        self._ids: list[int] = []
        self._seen = bytearray()  # the same, 4 bytes each: `rfind` searches them at memory speed
        self._taken = 0  # how many of the conversation's ids are among them
        self._predicted_at = range(0)  # where the prediction lies
        self._source = self._at = 0  # where the last draft was taken from; how many ids there were then

    def begin(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)
        if self._prediction:
            self._predicted_at = range(len(ids), len(ids) + len(self._prediction))
            self._ids += [*self._prediction, *ids[-self._SIZES[0] :]]
        self._seen = bytearray(_packed(self._ids))
        self._taken = len(ids)
        self._source = self._at = 0

    def promising(self, ids: Sequence[int]) -> bool:
        self._take(ids[self._taken :])
        return self._find(self._SIZES[-1]) >= 0 or self._find_near(self._ids[-1:]) >= 0

    def draft(self, ids: Sequence[int], token: int, most: int, sampler: Sampler) -> list[int]:
        found, known = self._locate([*ids[self._taken :], token]), self._ids
        self.predicted = 0
        if found < 0:
            return []
        guess = known[found : found + most]
        if found in self._predicted_at:
            guess = guess[: self._predicted_at.stop - found]
            self.predicted = len(guess)
            return guess
        period = len(known) - found
        while len(guess) < most:  # what repeats itself goes on repeating
            guess.append(guess[-period])
        return guess

    def guess(self, ids: Sequence[int]) -> int:
        """Guess the token that follows `ids`, as a draft would; −1 if nothing is found."""
        found = self._locate(ids[self._taken :])
        return self._ids[found] if found >= 0 else -1

    def _locate(self, new: Sequence[int]) -> int:
        """Find what follows once `new` has been said; −1 if that never stood there before."""
        self._take(new)
        found = self._find(self._SIZES[-1])
        if found >= 0:
            found = next((at for n in self._SIZES[:-1] if (at := self._find(n)) >= 0), found)
        else:
            found = self._find_near(self._ids[-2:])
        if found >= 0:
            self._source, self._at = found, len(self._ids)
        return found

    def _take(self, new: Sequence[int]) -> None:
        """Search more of the conversation from now on."""
        self._ids += new
        self._seen += _packed(new)
        self._taken += len(new)

    def _find(self, n: int) -> int:
        """Find what followed the last `n` tokens when they stood there before; −1 if never."""
        end = len(self._seen) - 4
        if end < n * 4:
            return -1
        pattern = self._seen[-n * 4 :]
        while (at := self._seen.rfind(pattern, 0, end)) >= 0 and at % 4:
            end = at + n * 4 - 1  # it lay across two ids
        return -1 if at < 0 else at // 4 + n

    def _find_near(self, last: Sequence[int]) -> int:
        """Find where a source that was just departed from goes on after `last`; −1 if nowhere."""
        copied = len(self._ids) - self._at
        if not self._at or copied > MAX_DRAFT + self._NEAR:
            return -1
        expected = self._source + copied
        places = range(max(0, expected - self._NEAR), min(expected + self._NEAR, self._at) - len(last))
        found = [at + len(last) for at in places if self._ids[at : at + len(last)] == last]
        return min(found, key=lambda at: abs(at - expected), default=-1)


class DraftModel:
    """Drafts with a smaller model that speaks the same tokens.

    Its own memory is bounded too: by its window, or by a stream of at most 4,096 keys.
    """

    def __init__(self, model: Mistral, vocab_size: int) -> None:
        """Take the `vocab_size` of the model to draft for: embeddings may be padded differently."""
        self.pace = Pace()
        self._model, self._vocab_size = model, vocab_size
        size = None if model.config.window else planned_length(model.config)
        self._cache = model.new_cache(slack=DRAFT_SLACK, max_kv_size=size)
        self._synced = 0  # tokens in its cache that are known to be the conversation's

    def begin(self, ids: Sequence[int]) -> None:
        self._synced = reuse(self._cache, ids)

    def promising(self, ids: Sequence[int]) -> bool:
        return True

    def draft(self, ids: Sequence[int], token: int, most: int, sampler: Sampler) -> list[int]:
        held = self._cache.ids
        while self._synced < min(len(held), len(ids)) and held[self._synced] == ids[self._synced]:
            self._synced += 1
        self._cache.rollback(len(held) - self._synced)
        logits = self._read([*ids[self._synced :], token])
        sampler = sampler.fork()
        chosen = [sampler(self._fit(logits))]
        while len(chosen) < most:
            logits = self._model.logits(chosen[-1][:, None], self._cache)[:, -1]
            chosen.append(sampler(self._fit(logits)))
        guess: list[int] = mx.concatenate(chosen).tolist()  # type: ignore[assignment]
        self._cache.ids += guess[:-1]
        return guess

    def _read(self, ids: list[int]) -> mx.array:
        """Logits [1, vocab_size] after more tokens of the conversation."""
        chunk = default_chunk(self._model)
        if len(ids) > chunk:
            return prefill(self._model, ids, self._cache, chunk)
        hidden = self._model.hidden(mx.array([ids]), self._cache)
        self._cache.ids += ids
        return self._model.head(hidden[:, -1:])[:, -1]

    def _fit(self, logits: mx.array) -> mx.array:
        """Logits [1, vocab_size of the other model]: the same noise must meet the same tokens."""
        missing = max(0, self._vocab_size - logits.shape[-1])
        return mx.pad(logits, [(0, 0), (0, missing)], constant_values=-mx.inf)[:, : self._vocab_size]


def load_draft_model(name: str | Path, model: Mistral, tokenizer: Tokenizer) -> DraftModel:
    """Load a folder, repository or alias as a draft model. Raises as `load`, and InputError."""
    draft, other = load(name)
    tokens = range(tokenizer.vocab_size)
    if other.vocab_size != tokenizer.vocab_size or any(
        other.token_bytes(i) != tokenizer.token_bytes(i) for i in tokens
    ):
        raise InputError(f"{name} has another tokenizer than the model it should draft for; choose one of its family")
    return DraftModel(draft, model.config.vocab_size)


def speculate(
    model: Mistral, logits: mx.array, cache: RollingCache, sampler: Sampler, limit: int | None, drafter: Drafter
) -> Generator[int, None, None]:
    """Yield the tokens of `m7mlx.decode.decode`, faster where the drafter guesses well.

    As long as no draft is promising, the next pass is under way before a token is read, as there.
    """
    if limit == 0:
        return
    pace = drafter.pace
    drafter.begin(cache.ids)
    token = sampler(logits)  # the next one
    mx.async_eval(token)
    value: int | None = None  # the same, if it has been read before its own pass was begun
    count = 0
    try:
        while count != limit:
            started = time.perf_counter()
            # Whatever happens while a draft is checked can be rolled back.
            room = min(MAX_DRAFT, cache.slack - 1, MAX_DRAFT if limit is None else limit - count - 1)
            waited = value is not None
            draft: list[int] = []
            if value is not None and (planned := pace.plan(room)):
                draft = drafter.draft(cache.ids, value, planned, sampler)
                # Past the embedding lies memory of others.
                draft = list(takewhile(lambda token: 0 <= token < model.config.vocab_size, draft))
            if value is not None and draft:
                new, value = _check(model, cache, sampler, value, draft)
                token = mx.array([value])
            else:
                following = sampler(model.logits(token[:, None], cache)[:, -1])
                mx.async_eval(following)
                new, token, value = [token.item()], following, None  # type: ignore[list-item]
            for each in new:
                cache.ids.append(each)
                yield each
                count += 1
            if value is None and count != limit and pace.plan(room) and drafter.promising(cache.ids):
                waited, value = True, token.item()  # type: ignore[assignment]
            seconds = time.perf_counter() - started
            if draft:
                pace.checked(len(draft), len(new) - 1, seconds)
            elif waited:
                pace.waited(seconds)
            else:
                pace.plain(seconds)
    finally:
        with contextlib.suppress(RollbackError):  # accepted, but nobody wanted them any more
            cache.rollback(cache.offset - len(cache.ids))


def _check(
    model: Mistral, cache: RollingCache, sampler: Sampler, token: int, draft: list[int]
) -> tuple[list[int], int]:
    """Return `token` and what of the draft is right, now in the cache; and the token after them."""
    right, following = settle(model.logits(mx.array([[token, *draft]]), cache), cache, sampler, draft)
    return [token, *draft[:right]], following


def settle(logits: mx.array, cache: RollingCache, sampler: Sampler, draft: list[int]) -> tuple[int, int]:
    """Return how many of a draft's tokens are right, and the token after these; undo the others.

    logits  [1, L, vocab_size] of a pass over the token before the draft, and the draft
    """
    chosen: list[int] = sampler.preview(logits, draft).tolist()  # type: ignore[assignment]
    right = next((i for i, guess in enumerate(draft) if guess != chosen[i]), len(draft))
    cache.rollback(len(draft) - right)
    sampler.accept(chosen[: right + 1])
    return right, chosen[right]


def _packed(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()
