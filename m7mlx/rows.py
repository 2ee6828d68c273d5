"""The answers under way, and the passes that give each of them a token, or several.

Most are rows of one batch, whose clock they share: what one of them undid, all would. So the
answers that are drafted for stay apart, each in the cache that its prompt was read into. All go
through the model side by side, and weights are read once; an answer that is apart may bring a draft
with it, and what of that is wrong is undone in its own cache alone. Its tokens are those that it
gets without drafts (`m7mlx.speculative`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from m7mlx.answer import Answer, Piece
from m7mlx.batch import BatchCache
from m7mlx.cache import KVCache, RollingCache
from m7mlx.compiled import step_of
from m7mlx.model import Mistral
from m7mlx.pace import MAX_DRAFT, Costs, Odds
from m7mlx.request import Request
from m7mlx.sampling import known
from m7mlx.speculative import PromptLookup, settle
from m7mlx.tokens.tokenizer import Tokenizer

_PATIENCE = 16  # steps without a draft, after which an answer that is not alone joins the batch

Told = list[tuple[int, Piece]]
"""Pieces of answers, each with the number that `Scheduler.add` gave to its request."""


class NumberedAnswer(Answer):
    """An answer among others.

    error   why its next token could not be chosen; chosen, how many were before that
    """

    def __init__(self, number: int, request: Request, model: Mistral, tokenizer: Tokenizer) -> None:
        super().__init__(request, model, tokenizer)
        self.number = number
        self.error: Exception | None = None
        self.chosen = 0

    @property
    def may_be_drafted(self) -> bool:
        """Whether its tokens are the same when several are looked at in one pass."""
        return self.sampler.looks_ahead and self.request.max_tokens != 1


@dataclass(eq=False)
class _Apart:
    """An answer in a cache of its own.

    token         chosen [1], and not in the cache yet; `value`, if it has been read
    is_promising  whether a draft may be found once the token is known
    draft         what is looked at together with the token in this step
    idle          steps since the last draft
    """

    answer: NumberedAnswer
    cache: RollingCache
    token: mx.array
    drafter: PromptLookup
    odds: Odds = field(default_factory=Odds)
    value: int | None = None
    is_promising: bool = False
    draft: list[int] = field(default_factory=list)
    idle: int = 0

    @property
    def room(self) -> int:
        """The most tokens of a draft: all of them can be undone, and the answer may have them."""
        left = self.answer.left
        return min(MAX_DRAFT, self.cache.slack - 1, MAX_DRAFT if left is None else left - 1)


class Rows:
    """Answers under way. They join, and each `decode` tells more of all of them.

    keeps    whether the conversations of answers that have ended are of use
    drafted  how many answers may be apart, and drafted for
    late     pieces of answers that ended outside of `decode`, for whoever asks next
    ended    conversations of answers that have ended, for whoever asks next
    """

    def __init__(
        self,
        model: Mistral,
        tokenizer: Tokenizer,
        keeps: bool,
        drafted: int = 0,
    ) -> None:
        self._model, self._vocab_size, self._keeps = model, tokenizer.vocab_size, keeps
        self._step = step_of(model)
        # What fails here alone would leave the other processes waiting.
        self._shared = model.exchange is not None
        self._drafted = 0 if self._shared else drafted
        self._batch: BatchCache | None = None
        self._answers: list[NumberedAnswer | None] = []  # by row of the batch; None where one has ended
        self._tokens = mx.array([0])  # chosen for each row, not yet read, nor in the batch
        self._apart: list[_Apart] = []
        self._costs: dict[int, Costs] = {}  # by the number of answers
        self._is_steady = False  # the last pass had no draft, and what it costs can be measured
        self.late: Told = []
        self.ended: list[tuple[NumberedAnswer, RollingCache]] = []

    @property
    def answers(self) -> list[NumberedAnswer]:
        """All answers under way."""
        return [*(a for a in self._answers if a is not None), *(one.answer for one in self._apart)]

    @property
    def batch(self) -> BatchCache | None:
        """The rows that share a clock."""
        return self._batch

    def join(self, answer: NumberedAnswer, token: mx.array) -> None:
        """Let an answer go on with the first token that was chosen for it."""
        cache, answer.cache = answer.cache, None
        assert cache is not None
        mx.async_eval(token)
        if len(self._apart) < self._drafted and answer.may_be_drafted:
            drafter = PromptLookup(answer.request.prediction)  # type: ignore[arg-type]
            drafter.begin(cache.ids)
            self._apart.append(_Apart(answer, cache, token, drafter))
        else:
            self._join_batch(answer, cache, token)

    def _join_batch(self, answer: NumberedAnswer, cache: RollingCache, token: mx.array) -> None:
        """Put an answer into the row of one that has ended, or into a new row."""
        batch = self._batch
        if batch is None:
            self._batch, self._answers, self._tokens = BatchCache([cache]), [answer], token
            return
        others = list(range(len(self._answers)))
        row = self._answers.index(None) if None in self._answers else len(others)
        try:
            batch.join(cache) if row == len(others) else batch.put(row, cache)
            tokens = mx.concatenate([self._tokens[:row], token, self._tokens[row + 1 :]])
            mx.async_eval(tokens)
        except Exception:
            self._keep_rows(others)  # without what has come of it
            raise
        self._answers[row:] = [answer, *self._answers[row + 1 :]]
        self._tokens = tokens

    def drop(self, answer: NumberedAnswer, *, others_come: bool) -> None:
        """End an answer that nobody wants any more; `late` tells of those that this may cost."""
        if answer in self._answers:
            self._retire(self._answers.index(answer))
            self.late += self._shrink(others_come)
        else:
            self._retire_apart(next(one for one in self._apart if one.answer is answer))

    def decode(self, *, others_come: bool, is_alone: bool) -> Told:
        """Tell the tokens chosen by the step before, and more where a draft was right.

        others_come  whether answers are about to join: rows that have ended wait for them
        is_alone     whether the device has done nothing else, so that its time can be measured
        """
        begun, apart = time.perf_counter(), list(self._apart)
        costs = self._costs.setdefault(len(self.answers), Costs(len(self.answers)))
        try:
            waited = self._draft(costs)
            drafted = sum(len(one.draft) for one in apart)
            told = self._advance(apart)
        except Exception as error:  # of all that share the pass
            return self._lose(error)
        seconds, count = time.perf_counter() - begun, sum(len(piece.ids) for _, piece in told)
        if not is_alone:
            pass
        elif drafted:
            costs.checked(drafted, count, seconds - waited)
            costs.waited(waited, 0)
        elif waited:
            costs.waited(seconds, count)
        elif self._is_steady:
            costs.plain(seconds)
        self._is_steady = is_alone and not drafted and not waited
        for one in self._apart:
            if not drafted and not waited:
                one.odds.plain()
            elif not one.draft:
                one.odds.waited()
            one.idle = 0 if one.draft else one.idle + 1
            one.draft = []
            one.is_promising = one.value is None and one.drafter.promising(one.cache.ids)
        return told + self._shrink(others_come) + self._settle_in()

    def _settle_in(self) -> Told:
        """Let answers without a draft for a while join the batch: a cache apart costs time."""
        told: Told = []
        if len(self.answers) > 1:
            for one in [one for one in self._apart if one.idle >= _PATIENCE]:
                self._apart.remove(one)
                try:
                    self._join_batch(one.answer, one.cache, one.token)
                except Exception as error:  # of this answer alone
                    told.append((one.answer.number, one.answer.fail(error)))
        return told

    def _draft(self, costs: Costs) -> float:
        """Draft where it pays; return the seconds that this took, where tokens were waited for."""
        able = [one for one in self._apart if one.value is not None or one.is_promising]
        plan = costs.plan([(one.odds, one.room) for one in able]) if able else []
        if not any(plan):
            return 0.0
        begun, must_wait = time.perf_counter(), any(one.value is None for one in able)
        for one, most in zip(able, plan, strict=True):
            if one.value is None:
                one.value = one.token.item()  # type: ignore[assignment]
            assert one.value is not None
            if most:
                one.draft = one.drafter.draft(one.cache.ids, one.value, most, one.answer.sampler)
        return time.perf_counter() - begun if must_wait else 0.0

    def _advance(self, apart: Sequence[_Apart]) -> Told:
        """Run a pass over the tokens that were chosen, and the drafts.

        Tell the tokens, and what is right of the drafts.
        """
        batch, tokens = self._batch, self._tokens
        passes: list[tuple[mx.array, KVCache]] = [] if batch is None else [(tokens[:, None], batch)]
        passes += [
            (mx.array([[one.value, *one.draft]]) if one.draft else one.token[:, None], one.cache) for one in apart
        ]
        logits = [self._step(*passes[0])] if len(passes) == 1 else self._model.logits_together(passes)
        if batch is not None:
            self._tokens = self._choose(self._answers, logits.pop(0)[:, -1])
        chosen = [
            self._choose([one.answer], own[:, -1]) if not one.draft else None
            for one, own in zip(apart, logits, strict=True)
        ]
        mx.async_eval(*([] if batch is None else [self._tokens]), *(one for one in chosen if one is not None))
        told: Told = []
        for one, own, following in zip(apart, logits, chosen, strict=True):
            told += self._tell_draft(one, own) if following is None else self._tell_token(one, following)
        return told if batch is None else told + self._tell_rows(batch, tokens.tolist())  # type: ignore[arg-type]

    def _tell_rows(self, batch: BatchCache, values: Sequence[int]) -> Told:
        told: Told = []
        for row, (answer, value) in enumerate(zip(self._answers, values, strict=True)):
            batch.ids[row].append(value)
            if answer is not None and (piece := self._taken(answer, value)):
                told.append((answer.number, piece))
                if piece.finish_reason is not None:
                    self._retire(row)
        return told

    def _tell_token(self, one: _Apart, following: mx.array) -> Told:
        value: int = one.token.item() if one.value is None else one.value  # type: ignore[assignment]
        one.token, one.value = following, None
        return self._tell_apart(one, [value])

    def _tell_draft(self, one: _Apart, logits: mx.array) -> Told:
        assert one.value is not None
        answer, predicted = one.answer, one.drafter.predicted
        try:
            right, following = settle(logits, one.cache, answer.sampler, one.draft)
        except Exception as error:  # nobody knows what its cache holds now
            self._apart.remove(one)
            return [(answer.number, answer.fail(error))]
        answer.chosen += right + 1
        answer.rejected += max(0, predicted - right)
        one.odds.checked(len(one.draft), right)
        told = self._tell_apart(one, [one.value, *one.draft[:right]], predicted)
        one.token, one.value = mx.array([following]), following
        return told

    def _tell_apart(self, one: _Apart, tokens: Sequence[int], predicted: int = 0) -> Told:
        """Tell tokens of an answer that are in its cache.

        predicted  how many of them, behind the first, were taken from its prediction
        """
        told: Told = []
        for i, token in enumerate(tokens):
            one.cache.ids.append(token)
            one.answer.accepted += 0 < i <= predicted
            piece = self._taken(one.answer, token)
            assert piece is not None  # which it is in models that are shared
            told.append((one.answer.number, piece))
            if piece.finish_reason is not None:
                self._retire_apart(one)
                break
        return told

    def _taken(self, answer: NumberedAnswer, token: int) -> Piece | None:
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

    def _choose(self, answers: Sequence[NumberedAnswer | None], logits: mx.array) -> mx.array:
        """Choose a token [B] for each row of logits [B, vocab_size]."""
        if all(a is None or a.sampler.is_greedy for a in answers):
            return self._model.agree(mx.argmax(known(logits, self._vocab_size), axis=-1))
        rows = [(answer, logits[row : row + 1]) for row, answer in enumerate(answers)]
        return mx.concatenate([self.choose(a, one) if a else mx.argmax(one, axis=-1) for a, one in rows])

    def choose(self, answer: NumberedAnswer, logits: mx.array) -> mx.array:  # [1, vocab_size] → [1]
        """Choose an answer's next token; any token where that fails, as the answer then does."""
        try:
            token = answer.sampler(logits)
            answer.chosen += answer.error is None
            return token
        except Exception as error:
            answer.error = error
            return self._model.agree(mx.argmax(known(logits, self._vocab_size), axis=-1))

    # --- answers that end -------------------------------------------------------------------------

    def _retire(self, row: int) -> None:
        """End the answer of a row of the batch."""
        answer, batch = self._answers[row], self._batch
        assert batch is not None and answer is not None
        self._answers[row] = None
        self._hand_over(answer, lambda: batch.row(row))

    def _retire_apart(self, one: _Apart) -> None:
        self._apart.remove(one)

        def conversation() -> RollingCache:
            one.cache.rollback(one.cache.offset - len(one.cache.ids))  # right, but nobody wanted them any more
            mx.eval(one.cache.arrays)
            return one.cache

        self._hand_over(one.answer, conversation)

    def _hand_over(self, answer: NumberedAnswer, conversation: Callable[[], RollingCache]) -> None:
        if not self._keeps:
            return
        try:
            self.ended.append((answer, conversation()))
        except Exception:  # it would have saved some reading, no more
            if self._shared:
                raise

    def _shrink(self, others_come: bool) -> Told:
        """Give up rows that have ended, once they cost more than laying the others out anew."""
        going = [i for i, answer in enumerate(self._answers) if answer]
        is_deserted = not others_come and len(going) <= len(self._answers) * 3 // 4
        try:
            if not going:
                self._batch, self._answers = None, []
            elif self._batch and (self._batch.outgrown(going) or is_deserted):
                self._lay_out(going)
        except Exception as error:
            return self._lose(error)
        return []

    def _keep_rows(self, rows: list[int]) -> None:
        try:
            self._lay_out(rows)
        except Exception as error:  # nobody knows what the batch holds now
            self.late += self._lose(error)

    def _lay_out(self, rows: list[int]) -> None:
        """Lay the batch out anew with these rows alone."""
        assert self._batch is not None
        self._batch.keep(rows)
        self._answers, self._tokens = [self._answers[i] for i in rows], self._tokens[mx.array(rows)]

    def _lose(self, error: Exception) -> Told:
        """End all answers, whose pass has failed; return their last pieces."""
        if self._shared:
            raise error
        lost = self.answers
        self._batch, self._answers, self._apart = None, [], []
        return [(answer.number, answer.fail(error)) for answer in lost]
