"""Many requests at once: between the steps of a batch, prompts are read a chunk at a time.

A step is one pass over a token of every answer under way, built before the tokens of the last one
are read. Requests join and leave between steps. Memory is bounded by rows × window; as many
conversations again that have ended may be kept, so that a request that begins like an earlier one
reads only what is new.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import mlx.core as mx

from m7mlx.answer import Answer, Piece
from m7mlx.batch import BatchCache
from m7mlx.cache import RollingCache
from m7mlx.compiled import step_of
from m7mlx.decode import default_chunk, goes_on, read_chunk, reusable, reuse, shared_start
from m7mlx.errors import InputError, PromptTooLongError
from m7mlx.memory import UNDO_SLACK
from m7mlx.model import Mistral
from m7mlx.request import Request, prepare
from m7mlx.sampling import known
from m7mlx.tokens.tokenizer import Tokenizer

_SCORED = 128  # positions of a prompt whose logits are held at one time
_TURNS = 4  # prompts of which a chunk is read between two steps: more would stall the answers

Told = list[tuple[int, Piece]]
"""Pieces of answers, each with the number that `Scheduler.add` gave to its request."""


class _Numbered(Answer):
    """An answer among others."""

    def __init__(self, number: int, request: Request, model: Mistral, tokenizer: Tokenizer) -> None:
        super().__init__(request, model, tokenizer)
        self.number = number
        self.error: Exception | None = None  # the next token could not be chosen
        self.chosen = 0  # tokens that were chosen before that
        self.space = request.space
        self._alike: WeakKeyDictionary[_Numbered | Ended, int] = WeakKeyDictionary()

    def shares(self, other: _Numbered | Ended) -> int:
        """How many ids its prompt and another, or a conversation that has ended, begin with alike.

        It is asked before each step, and neither changes: a million ids are compared once. What is
        of another space has nothing in common.
        """
        if other.space != self.space:
            return 0
        if other not in self._alike:
            self._alike[other] = shared_start(self.ids, other.ids)
        return self._alike[other]


class Ended:
    """A conversation that has ended, and is kept for those of its space that begin alike."""

    def __init__(self, cache: RollingCache, space: str) -> None:
        self.cache, self.space = cache, space

    @property
    def ids(self) -> Sequence[int]:
        return self.cache.ids


class Scheduler:
    """Answers many requests at once; call `step` until it returns False, all on MLX's thread.

    rows   answers at a time; kept, how many conversations that have ended are kept for prefixes
    slack  tokens that a kept conversation can be cut back by once its window has turned
    """

    def __init__(
        self,
        model: Mistral,
        tokenizer: Tokenizer,
        *,
        rows: int = 8,
        kept: int = 8,
        slack: int = UNDO_SLACK,
        kv_bits: int | None = None,
    ) -> None:
        """Make a scheduler. Raises InputError for numbers that make no sense."""
        if rows < 1 or kept < 0:
            raise InputError(f"a scheduler needs at least one row, and may keep conversations: not {rows} and {kept}")
        self._model, self._tokenizer, self._rows = model, tokenizer, rows
        self.options = {"rows": rows, "kept": kept, "slack": slack, "kv_bits": kv_bits}
        self._step = step_of(model)
        # What fails here alone would leave the other processes waiting.
        self._shared = model.exchange is not None
        self._new = model.new_cache(slack=slack, kv_bits=kv_bits)
        self._waiting: deque[_Numbered] = deque()
        self._reading: deque[_Numbered] = deque()  # their prompts take turns
        self._batch: BatchCache | None = None
        self._answers: list[_Numbered | None] = []  # by row of the batch; None where one has ended
        self._tokens = mx.array([0])  # chosen for each row, not yet read, nor in the batch
        self._kept: deque[Ended] = deque(maxlen=kept)  # what is of use is given up last
        self._late: Told = []  # of answers that ended outside of a step
        self._count = 0

    @property
    def running_and_waiting(self) -> tuple[int, int]:
        """How many requests are being read or answered, and how many wait."""
        return sum(a is not None for a in self._answers) + len(self._reading), len(self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request; return its number. Raises what `m7mlx.stream_generate` raises."""
        return self.admit(self.prepare(request))

    def prepare(self, request: Request) -> Request:
        """The request as it will be answered; raises as `add`."""
        scored_only = request.max_tokens == 0 and request.prompt_logprobs is not None
        if request.max_tokens is not None and request.max_tokens < 1 and not scored_only:
            raise InputError(f"max_tokens must be at least 1, got {request.max_tokens}")
        ready = prepare(request, self._model, self._tokenizer, self._new)
        if ready.max_tokens == 0 and not scored_only:
            raise PromptTooLongError(
                f"the prompt has {len(ready.ids)} tokens and leaves no room for an answer; "
                "shorten it, or start a new conversation",
                len(ready.ids) - 1,
                len(ready.ids),
            )
        return ready

    def admit(self, request: Request) -> int:
        """Queue a request that is prepared; return its number.

        One that wants no token, nor to know of its prompt's, ends with the next step.
        """
        self._count += 1
        answer = _Numbered(self._count, request, self._model, self._tokenizer)
        if request.max_tokens == 0 and request.prompt_logprobs is None:
            self._late.append((answer.number, answer.end("length")))
        else:
            self._waiting.append(answer)
        return self._count

    def cancel(self, number: int) -> Piece | None:
        """End a request, wherever it is; return its last piece, or None if it has ended already."""
        everyone = (*self._waiting, *self._reading, *self._answers)
        answer = next((a for a in everyone if a is not None and a.number == number), None)
        if answer is None:
            return None
        if answer in self._waiting:
            self._waiting.remove(answer)
        elif answer in self._reading:
            self._reading.remove(answer)
        else:
            self._retire(self._answers.index(answer))
            self._late += self._shrink()
        return answer.fail(answer.error) if answer.error else answer.end("cancelled")

    def broken(self) -> list[int]:
        """Return the numbers of failed answers that other processes go on with until told."""
        return [a.number for a in self._answers if a is not None and a.error] if self._shared else []

    @property
    def new_cache(self) -> RollingCache:
        """An empty cache with the options that all answers' have."""
        return self._new

    @property
    def kept(self) -> list[Ended]:
        """Conversations that have ended and are kept; the one to be given up next comes first."""
        return list(self._kept)

    def keep(self, ended: Ended) -> None:
        """Keep a conversation that has ended, in the place of those that it goes on from."""
        self._kept = deque([*(k for k in self._kept if not _goes_on(k, ended)), ended], self._kept.maxlen)

    def held(self, request: Request) -> int:
        """How many tokens of the start of a prompt are held for its space."""
        known = [
            reusable(
                shared_start(request.ids, kept.ids), kept.cache.offset, kept.cache.max_rollback, len(request.ids)
            )
            for kept in self._kept
            if kept.space == request.space
        ]
        return max(known, default=0)

    def step(self) -> tuple[Told, bool]:
        """Read some of the prompts and decode a token of every answer.

        Returns their pieces, and whether there is more to do.
        """
        told = self._read()
        if any(self._answers):
            told += self._decode()
        late, self._late = self._late, []
        return late + told, any(self.running_and_waiting)

    # --- prompts ----------------------------------------------------------------------------------

    def _read(self) -> Told:
        """Read a chunk of each of the prompts whose turn it is; what is whole joins the batch."""
        while self._waiting and self.running_and_waiting[0] < self._rows:
            self._reading.append(self._waiting.popleft())
        told: Told = []
        turns = 0
        for _ in range(len(self._reading)):
            if turns == _TURNS:
                break
            answer = self._reading.popleft()
            if self._may_wait(answer):
                self._reading.append(answer)
                continue
            turns += 1
            try:
                logits = self._chunk(answer, told)
                if logits is None:
                    self._reading.append(answer)
                elif answer.request.max_tokens == 0:
                    told.append((answer.number, answer.end("length")))
                else:
                    self._join(answer, self._token(answer, logits))
            except Exception as error:  # of this request alone
                if self._shared:
                    raise
                told.append((answer.number, answer.fail(error)))
        return told

    def _may_wait(self, answer: _Numbered) -> bool:
        """Whether a prompt that is being read will soon hold more of the start of this one.

        The wait ends one chunk before they part: a ring that has turned could not go back to there.
        """
        if answer.cache is not None or answer.request.prompt_logprobs is not None:
            return False
        chunk = default_chunk(self._model)
        reading = [a for a in self._reading if a.cache is not None]
        soon = [answer.shares(a) for a in reading if a.cache and answer.shares(a) >= a.cache.offset + chunk]
        return bool(soon) and max(soon) >= self._source(answer)[0] + chunk

    def _chunk(self, answer: _Numbered, told: Told) -> mx.array | None:
        """Read a chunk of a prompt; return the logits [1, vocab_size] once all of it is read.

        What is asked of the prompt's own tokens is added to `told`.
        """
        is_scored = answer.request.prompt_logprobs is not None
        if answer.cache is None:
            # What was held already would have no logits.
            cache = self._new.like() if is_scored else self._longest_start(answer)
            answer.begin(cache, cache.offset)
        else:
            cache = answer.cache
        chunk = default_chunk(self._model)
        end = cache.offset + chunk
        if len(answer.ids) - end < chunk // 2:  # so few would cost nearly as much as a whole chunk
            end = len(answer.ids)
        begin = cache.offset
        hidden = read_chunk(self._model, list(answer.ids[begin:end]), cache, every=is_scored)
        for position in range(0, hidden.shape[1] if is_scored else 0, _SCORED):
            logits = self._model.head(hidden[:, position : position + _SCORED])[0]
            if scores := answer.score(logits, begin + position):
                told.append((answer.number, Piece(prompt=scores)))
        if cache.offset < len(answer.ids):
            return None
        answer.read()
        return self._model.head(hidden[:, -1:])[:, -1]

    def _longest_start(self, answer: _Numbered) -> RollingCache:
        """Make a cache that holds as much of a prompt's start as any conversation that is here."""
        cache = self._new.like()
        best, source = self._source(answer)
        if source is not None:
            reuse(cache, answer.ids, [source.snapshot()])
        used = next((kept for kept in self._kept if best and answer.shares(kept) >= best), None)
        if used is not None:  # what is of use is given up last
            self._kept.remove(used)
            self._kept.append(used)
        return cache

    def _source(self, answer: _Numbered) -> tuple[int, RollingCache | None]:
        """How much of the start of a prompt is held, and by whom."""
        best, source = 0, None
        held = [(answer.shares(kept), kept.cache) for kept in self._kept]
        held += [(min(answer.shares(a), a.cache.offset), a.cache) for a in self._reading if a.cache is not None]
        for shared, cache in held:
            known = reusable(shared, cache.offset, cache.max_rollback, len(answer.ids))
            if known > best:
                best, source = known, cache
        return best, source

    # --- the batch --------------------------------------------------------------------------------

    def _join(self, answer: _Numbered, token: mx.array) -> None:
        """Put an answer into the row of one that has ended, or into a new row."""
        cache, answer.cache = answer.cache, None
        assert cache is not None
        mx.async_eval(token)
        if self._batch is None:
            self._batch, self._answers, self._tokens = BatchCache([cache]), [answer], token
            return
        others = list(range(len(self._answers)))
        row = self._answers.index(None) if None in self._answers else len(others)
        try:
            self._batch.join(cache) if row == len(others) else self._batch.put(row, cache)
            tokens = mx.concatenate([self._tokens[:row], token, self._tokens[row + 1 :]])
            mx.async_eval(tokens)
        except Exception:
            self._keep(others)  # without what has come of it
            raise
        self._answers[row:] = [answer, *self._answers[row + 1 :]]
        self._tokens = tokens

    def _keep(self, rows: list[int]) -> None:
        assert self._batch is not None
        try:
            self._batch.keep(rows)
        except Exception as error:  # nobody knows what the batch holds now
            self._late += self._lose(error)
        else:
            self._answers, self._tokens = [self._answers[i] for i in rows], self._tokens[mx.array(rows)]

    def _lose(self, error: Exception) -> Told:
        """End all answers of the batch, which has failed; return their last pieces."""
        if self._shared:
            raise error
        lost = [answer for answer in self._answers if answer]
        self._batch, self._answers = None, []
        return [(answer.number, answer.fail(error)) for answer in lost]

    def _decode(self) -> Told:
        """Return the pieces of tokens chosen by the step before, with the next under way."""
        batch, tokens = self._batch, self._tokens
        assert batch is not None
        try:
            self._tokens = self._choose(self._step(tokens[:, None], batch)[:, -1])
            mx.async_eval(self._tokens)
            values: list[int] = tokens.tolist()  # type: ignore[assignment]
        except Exception as error:  # of all that share the pass
            return self._lose(error)
        told: Told = []
        for row, (answer, value) in enumerate(zip(self._answers, values, strict=True)):
            batch.ids[row].append(value)
            if answer is not None and (piece := self._taken(answer, value)):
                told.append((answer.number, piece))
                if piece.finish_reason is not None:
                    self._retire(row)
        return told + self._shrink()

    def _taken(self, answer: _Numbered, token: int) -> Piece | None:
        """Return the piece of one more token of an answer; any failure is the answer's own."""
        try:
            piece = answer.take(token)
        except Exception as error:
            if self._shared:
                raise
            return answer.fail(error)
        is_whole = piece.stats is not None and piece.stats.generated_tokens <= answer.chosen
        if answer.error is None or is_whole:  # what failed was a token that the answer does not need
            return piece
        if self._shared and piece.finish_reason is None:
            return None  # the other processes go on with it, until it is cancelled on all
        return answer.fail(answer.error)

    def _choose(self, logits: mx.array) -> mx.array:  # [B, vocab_size] → [B]
        answers = self._answers
        if all(a is None or a.sampler.is_greedy for a in answers):
            return self._model.agree(mx.argmax(known(logits, self._tokenizer.vocab_size), axis=-1))
        rows = [(answer, logits[row : row + 1]) for row, answer in enumerate(answers)]
        return mx.concatenate([self._token(a, one) if a else mx.argmax(one, axis=-1) for a, one in rows])

    def _token(self, answer: _Numbered, logits: mx.array) -> mx.array:  # [1, vocab_size] → [1]
        """Choose an answer's next token; any token where that fails, as the answer then does."""
        try:
            token = answer.sampler(logits)
            answer.chosen += answer.error is None
            return token
        except Exception as error:
            answer.error = error
            return self._model.agree(mx.argmax(known(logits, self._tokenizer.vocab_size), axis=-1))

    def _retire(self, row: int) -> None:
        """End the answer of a row; its conversation replaces those that it goes on from."""
        answer = self._answers[row]
        assert self._batch is not None and answer is not None
        self._answers[row] = None
        if not self._kept.maxlen:
            return
        try:
            self.keep(Ended(self._batch.row(row), answer.space))
        except Exception:  # it would have saved some reading, no more
            if self._shared:
                raise

    def _shrink(self) -> Told:
        """Give up rows that have ended, once they cost more than laying the others out anew."""
        going = [i for i, answer in enumerate(self._answers) if answer]
        try:
            if not going:
                self._batch, self._answers = None, []
            elif self._batch and (self._batch.outgrown(going) or self._deserted(going)):
                self._batch.keep(going)
                self._answers, self._tokens = [self._answers[i] for i in going], self._tokens[mx.array(going)]
        except Exception as error:
            return self._lose(error)
        return []

    def _deserted(self, going: list[int]) -> bool:
        return not self._waiting and not self._reading and len(going) <= len(self._answers) * 3 // 4


def _goes_on(ended: Ended, other: Ended) -> bool:
    """Whether `other` goes on from a conversation of its space, and can go back to there."""
    return ended.space == other.space and goes_on(ended.ids, other.ids, other.cache.max_rollback)
