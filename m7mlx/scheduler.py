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

from m7mlx.answer import Piece
from m7mlx.cache import RollingCache
from m7mlx.decode import default_chunk, goes_on, read_chunk, reusable, reuse, shared_start
from m7mlx.errors import InputError, PromptTooLongError
from m7mlx.memory import UNDO_SLACK
from m7mlx.model import Mistral
from m7mlx.numbered import NumberedAnswer
from m7mlx.request import Request, prepare
from m7mlx.rows import Rows, Told
from m7mlx.tokens.tokenizer import Tokenizer

_SCORED = 128  # positions of a prompt whose logits are held at one time
_TURNS = 4  # prompts of which a chunk is read between two steps: more would stall the answers


class _Numbered(NumberedAnswer):
    """An answer of a space, which can go on from what others of it begin with."""

    def __init__(self, number: int, request: Request, model: Mistral, tokenizer: Tokenizer) -> None:
        super().__init__(number, request, model, tokenizer)
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

    rows     answers at a time; kept, how many conversations that have ended are kept for prefixes
    slack    tokens that a kept conversation can be cut back by once its window has turned
    max_kv_size  keys that layers without a window keep (`RollingCache`)
    drafted  answers at a time that may get several tokens from one pass, of those that are looked
             up in their prompts and predictions (`m7mlx.rows`)
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
        max_kv_size: int | None = None,
        drafted: int = 0,
    ) -> None:
        """Make a scheduler. Raises InputError for numbers that make no sense."""
        if rows < 1 or kept < 0 or drafted < 0:
            raise InputError(
                "a scheduler needs at least one row, and may keep conversations and draft: "
                f"not {rows}, {kept} and {drafted}"
            )
        self._model, self._tokenizer, self._most_rows = model, tokenizer, rows
        self.options = {
            "rows": rows,
            "kept": kept,
            "slack": slack,
            "kv_bits": kv_bits,
            "max_kv_size": max_kv_size,
            "drafted": drafted,
        }
        # What fails here alone would leave the other processes waiting.
        self._shared = model.exchange is not None
        self._new = model.new_cache(slack=slack, kv_bits=kv_bits, max_kv_size=max_kv_size)
        self._waiting: deque[_Numbered] = deque()
        self._reading: deque[_Numbered] = deque()  # their prompts take turns
        self._rows = Rows(model, tokenizer, kept > 0, drafted)
        self._kept: deque[Ended] = deque(maxlen=kept)  # what is of use is given up last
        self._late: Told = []  # of answers that ended outside of a step
        self._count = 0

    @property
    def running_and_waiting(self) -> tuple[int, int]:
        """How many requests are being read or answered, and how many wait."""
        return len(self._rows.answers) + len(self._reading), len(self._waiting)

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
        everyone = (*self._waiting, *self._reading, *self._rows.answers)
        answer = next((a for a in everyone if a.number == number), None)
        if answer is None:
            return None
        if isinstance(answer, _Numbered) and answer in self._waiting:
            self._waiting.remove(answer)
        elif isinstance(answer, _Numbered) and answer in self._reading:
            self._reading.remove(answer)
        else:
            self._rows.drop(answer, others_come=self._others_come)
            self._keep_ended()
        return answer.fail(answer.error) if answer.error else answer.end("cancelled")

    def broken(self) -> list[int]:
        """Return the numbers of failed answers that other processes go on with until told."""
        return [a.number for a in self._rows.answers if a.error] if self._shared else []

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
        was_reading = self._others_come
        told = self._read()
        if self._rows.answers:
            told += self._rows.decode(others_come=self._others_come, is_alone=not was_reading)
            self._keep_ended()
        late, self._late, self._rows.late = self._late + self._rows.late, [], []
        return late + told, any(self.running_and_waiting)

    @property
    def _others_come(self) -> bool:
        return bool(self._waiting or self._reading)

    def _keep_ended(self) -> None:
        ended, self._rows.ended = self._rows.ended, []
        for answer, cache in ended:
            self.keep(Ended(cache, answer.request.space))

    # --- prompts ----------------------------------------------------------------------------------

    def _read(self) -> Told:
        """Read a chunk of each of the prompts whose turn it is; what is whole joins the batch."""
        while self._waiting and self.running_and_waiting[0] < self._most_rows:
            self._reading.append(self._waiting.popleft())
        told: Told = []
        turns = 0
        for _ in range(len(self._reading)):
            if turns == _TURNS:
                break
            answer = self._reading[0]
            self._reading.rotate(-1)
            if self._may_wait(answer):
                continue
            turns += 1
            try:
                logits = self._chunk(answer, told)
                if logits is None:
                    continue
                self._reading.remove(answer)
                if answer.request.max_tokens == 0:
                    told.append((answer.number, answer.end("length")))
                else:
                    self._rows.join(answer, self._rows.choose(answer, logits))
            except Exception as error:  # of this request alone
                if self._shared:
                    raise
                if answer in self._reading:
                    self._reading.remove(answer)
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


def _goes_on(ended: Ended, other: Ended) -> bool:
    """Whether `other` goes on from a conversation of its space, and can go back to there."""
    return ended.space == other.space and goes_on(ended.ids, other.ids, other.cache.max_rollback)
