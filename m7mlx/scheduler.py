"""Many requests at once: prompts are read a chunk at a time between the steps of a batch that answers all others.

A step is one pass over a token of every answer under way, built before the tokens of the last one are read. Requests
join and leave between steps. Memory is bounded by rows × window; as many conversations again that have ended may be
kept, so that a request that begins like an earlier one reads only what is new.
"""

from __future__ import annotations

from collections import deque

import mlx.core as mx

from m7mlx.batch import BatchCache
from m7mlx.cache import UNDO_SLACK, RollingCache
from m7mlx.compiled import step_of
from m7mlx.decode import default_chunk, read_chunk, reusable, reuse, shared_start
from m7mlx.errors import InputError, TokenizerError
from m7mlx.generation import StopFilter, check_prompt
from m7mlx.model import Mistral
from m7mlx.request import Answer, Event, Request
from m7mlx.sampling import known
from m7mlx.tokens.tokenizer import Tokenizer

_TURNS = 4  # prompts of which a chunk is read between two steps: more would stall the answers under way


class Scheduler:
    """Call `step` until it returns False; all on one thread, MLX's.

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
        """Raises InputError for numbers that make no sense."""
        if rows < 1 or kept < 0:
            raise InputError(f"a scheduler needs at least one row, and may keep conversations: not {rows} and {kept}")
        self._model, self._tokenizer, self._rows = model, tokenizer, rows
        self.options = {"rows": rows, "kept": kept, "slack": slack, "kv_bits": kv_bits}
        self._step = step_of(model)
        self._shared = model.exchange is not None  # a failed pass failed here alone, and other processes wait for it
        self._new = model.new_cache(slack=slack, kv_bits=kv_bits)
        self._waiting: deque[Answer] = deque()
        self._reading: deque[Answer] = deque()  # their prompts take turns
        self._batch: BatchCache | None = None
        self._answers: list[Answer | None] = []  # by row of the batch; None where one has ended
        self._tokens = mx.array([0])  # chosen for each row, not yet read, nor in the batch
        self._kept: deque[RollingCache] = deque(maxlen=kept)
        self._late: list[Event] = []  # of answers that ended outside of a step
        self._count = 0

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are being read or answered, and how many wait."""
        return sum(a is not None for a in self._answers) + len(self._reading), len(self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request; its number. Raises what `m7mlx.stream_generate` raises for its prompt and options."""
        return self.admit(request, self.check(request))

    def check(self, request: Request) -> int | None:
        """How many tokens its answer may have; raises as `add`."""
        if request.max_tokens is not None and request.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {request.max_tokens}")
        StopFilter(request.stop)
        for token in request.logit_bias:
            if not 0 <= token < min(self._model.config.vocab_size, self._tokenizer.vocab_size):
                raise TokenizerError(f"logit_bias: token id {token} is outside the model's vocabulary")
        room = check_prompt(self._model, request.ids, self._new)
        return min((n for n in (room, request.max_tokens) if n is not None), default=None)

    def admit(self, request: Request, limit: int | None) -> int:
        """Queue a request that has been checked; its number."""
        self._count += 1
        self._waiting.append(Answer(self._count, request, limit, self._model, self._tokenizer))
        return self._count

    def cancel(self, number: int) -> Event | None:
        """End a request, wherever it is; its last event, or None if it has ended already."""
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
        """Numbers of answers that have failed and wait to be cancelled, where other processes must hear of it."""
        return [a.number for a in self._answers if a is not None and a.error] if self._shared else []

    def step(self) -> tuple[list[Event], bool]:
        """One chunk of a prompt, one token of every answer; their events, and whether there is more to do."""
        events = self._read()
        if any(self._answers):
            events += self._decode()
        late, self._late = self._late, []
        return late + events, any(self.load)

    # --- prompts ----------------------------------------------------------------------------------------

    def _read(self) -> list[Event]:
        """Read a chunk of each of the prompts whose turn it is; what is whole joins the batch."""
        while self._waiting and self.load[0] < self._rows:
            self._reading.append(self._waiting.popleft())
        events, turns = [], 0
        for _ in range(len(self._reading)):
            if turns == _TURNS:
                break
            answer = self._reading.popleft()
            if self._may_wait(answer):
                self._reading.append(answer)
                continue
            turns += 1
            try:
                logits = self._chunk(answer)
                if logits is None:
                    self._reading.append(answer)
                else:
                    self._join(answer, self._token(answer, logits))
            except Exception as error:  # of this request alone
                if self._shared:
                    raise
                events.append(answer.fail(error))
        return events

    def _may_wait(self, answer: Answer) -> bool:
        """Whether a prompt that came before is being read and will soon hold more of the start of this one.

        The wait ends one chunk before they part: a ring that has turned could not go back to there.
        """
        if answer.cache is not None:
            return False
        chunk = default_chunk(self._model)
        reading = [a for a in self._reading if a.cache is not None]
        soon = [answer.shares(a) for a in reading if a.cache and answer.shares(a) >= a.cache.offset + chunk]
        return bool(soon) and max(soon) >= self._source(answer)[0] + chunk

    def _chunk(self, answer: Answer) -> mx.array | None:
        """Logits [1, vocab_size] once the whole prompt is read."""
        if answer.cache is None:
            answer.cache = self._longest_start(answer)
            answer.reused = answer.cache.offset
        cache = answer.cache
        chunk = default_chunk(self._model)
        end = cache.offset + chunk
        if len(answer.ids) - end < chunk // 2:  # so few rows would cost nearly as much as a whole chunk
            end = len(answer.ids)
        hidden = read_chunk(self._model, list(answer.ids[cache.offset : end]), cache)
        return self._model.head(hidden)[:, -1] if cache.offset == len(answer.ids) else None

    def _longest_start(self, answer: Answer) -> RollingCache:
        """A cache that holds as much of the start of a prompt as any conversation that has ended or is being read."""
        cache = self._new.like()
        best, source = self._source(answer)
        if source is not None:
            reuse(cache, answer.ids, [source.snapshot()])
        used = next((kept for kept in self._kept if best and answer.shares(kept) >= best), None)
        if used is not None:  # what is of use is given up last
            self._kept.remove(used)
            self._kept.append(used)
        return cache

    def _source(self, answer: Answer) -> tuple[int, RollingCache | None]:
        """How much of the start of a prompt is held, and by whom."""
        best, source = 0, None
        held = [(answer.shares(kept), kept) for kept in self._kept]
        held += [(min(answer.shares(a), a.cache.offset), a.cache) for a in self._reading if a.cache is not None]
        for shared, cache in held:
            known = reusable(shared, cache.offset, cache.max_rollback, len(answer.ids))
            if known > best:
                best, source = known, cache
        return best, source

    # --- the batch --------------------------------------------------------------------------------------

    def _join(self, answer: Answer, token: mx.array) -> None:
        """Into the row of one that has ended, or a new one."""
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

    def _lose(self, error: Exception) -> list[Event]:
        """End all answers of the batch, which has failed; their events."""
        if self._shared:
            raise error
        lost = [answer for answer in self._answers if answer]
        self._batch, self._answers = None, []
        return [answer.fail(error) for answer in lost]

    def _decode(self) -> list[Event]:
        """The tokens chosen by the step before, and the next ones under way."""
        batch, tokens = self._batch, self._tokens
        assert batch is not None
        try:
            self._tokens = self._choose(self._step(tokens[:, None], batch)[:, -1])
            mx.async_eval(self._tokens)
            values: list[int] = tokens.tolist()  # type: ignore[assignment]
        except Exception as error:  # of all that share the pass
            return self._lose(error)
        events = []
        for row, (answer, value) in enumerate(zip(self._answers, values, strict=True)):
            batch.ids[row].append(value)
            if answer is not None and (event := self._taken(answer, value)):
                events.append(event)
                if event.reason is not None:
                    self._retire(row)
        return events + self._shrink()

    def _taken(self, answer: Answer, token: int) -> Event | None:
        """The event of one more token of an answer; what goes wrong with it is its own."""
        try:
            event = answer.take(token)
        except Exception as error:
            if self._shared:
                raise
            return answer.fail(error)
        if answer.error is None:
            return event
        if self._shared and event.reason is None:
            return None  # the other processes go on with it: it ends when it is cancelled on all of them
        return answer.fail(answer.error)

    def _choose(self, logits: mx.array) -> mx.array:  # [B, vocab_size] → [B]
        answers = self._answers
        if all(a is None or a.sampler.is_greedy for a in answers):
            return self._model.agree(mx.argmax(known(logits, self._tokenizer.vocab_size), axis=-1))
        rows = [(answer, logits[row : row + 1]) for row, answer in enumerate(answers)]
        return mx.concatenate([self._token(a, one) if a else mx.argmax(one, axis=-1) for a, one in rows])

    def _token(self, answer: Answer, logits: mx.array) -> mx.array:  # [1, vocab_size] → [1]
        """What an answer chooses. Where its grammar fails, any token: it will be told that it has failed."""
        try:
            return answer.sampler(logits)
        except Exception as error:
            answer.error = error
            return self._model.agree(mx.argmax(known(logits, self._tokenizer.vocab_size), axis=-1))

    def _retire(self, row: int) -> None:
        """End the answer of a row, and keep its conversation in the place of those that it goes on from."""
        assert self._batch is not None
        self._answers[row] = None
        if not self._kept.maxlen:
            return
        try:
            ended = self._batch.row(row)
            self._kept = deque([*(k for k in self._kept if not _goes_on(k, ended)), ended], self._kept.maxlen)
        except Exception:  # it would have saved some reading, no more
            if self._shared:
                raise

    def _shrink(self) -> list[Event]:
        """Give up the rows of answers that have ended, once they cost more than laying the others out anew."""
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


def _goes_on(cache: RollingCache, later: RollingCache) -> bool:
    """Whether `later` goes on from `cache`, and can go back to there."""
    length = len(cache.ids)
    if later.offset - cache.offset > later.max_rollback or cache.ids[-1:] != later.ids[max(length - 1, 0) : length]:
        return False
    return shared_start(cache.ids, later.ids) == length
