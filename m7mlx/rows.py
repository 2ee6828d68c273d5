"""The answers under way, and the passes that give each of them a token, or several.

Most are rows of one batch, whose clock they share: what one of them undid, all would. So an answer
that is drafted for goes apart, into a cache of its own. All go through the model side by side, and
weights are read once; an answer that is apart may bring a draft with it, and what of that is wrong
is undone in its own cache alone. Its tokens are those that it gets without drafts
(`m7mlx.speculative`).

Caches apart cost time, so an answer goes there when it has been seen to copy: as long as it is a
row of the batch, the next token is guessed and the guess compared with what comes, which costs
nothing. An answer that is alone is apart from the beginning: it shares its pass with nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from m7mlx.answer import Piece
from m7mlx.batch import BatchCache
from m7mlx.cache import KVCache, RollingCache
from m7mlx.compiled import step_of
from m7mlx.model import Mistral
from m7mlx.numbered import Apart, Lookup, NumberedAnswer, room
from m7mlx.pace import Costs
from m7mlx.sampling import known
from m7mlx.speculative import PromptLookup, settle
from m7mlx.tokens.tokenizer import Tokenizer

_PATIENCE = 16  # steps without a draft, after which an answer that is not alone joins the batch
_SURE = 4  # guesses that are right, one after the other, before an answer goes apart
_ASK = 16  # steps between two looks whether any draft could pay

Told = list[tuple[int, Piece]]
"""Pieces of answers, each with the number that `Scheduler.add` gave to its request."""


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
        self._apart: list[Apart] = []
        self._costs: dict[int, Costs] = {}  # by the number of answers
        self._is_steady = False  # the last pass had no draft, and what it costs can be measured
        self._looks_up = (0, 0, False)  # answers, steps until it is asked again, whether a draft could pay
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
        if self._drafted and answer.may_be_drafted:
            answer.lookup = Lookup(PromptLookup(answer.request.prediction), cache.ids)  # type: ignore[arg-type]
        if answer.lookup is not None and not self.answers:
            self._apart.append(Apart(answer, cache, token, answer.lookup))
        else:
            self._join_batch(answer, cache, token)
            for one in self._apart:  # that were alone
                one.idle = one.idle if one.lookup.odds.is_copying else _PATIENCE

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
        begun, apart, costs = time.perf_counter(), list(self._apart), self._costs_now
        try:
            waited = self._draft(costs)
            drafted = sum(len(one.draft) for one in apart)
            told = self._advance(apart)
        except Exception as error:  # of all that share the pass
            return self._lose(error)
        if is_alone:
            tokens = sum(len(piece.ids) for _, piece in told)
            self._note(costs, time.perf_counter() - begun, waited, drafted, tokens)
        self._is_steady = is_alone and not drafted and not waited
        for one in self._apart:
            if not drafted and not waited:
                one.lookup.odds.plain()
            elif not one.draft:
                one.lookup.odds.waited()
            one.idle = 0 if one.draft else one.idle + 1
            one.draft = []
            one.is_promising = one.value is None and one.lookup.drafter.promising(one.cache.ids)
        told += self._shrink(others_come)
        begun = time.perf_counter()
        if self._settle_in(told) + self._part():
            told += self._shrink(others_come)
            self._costs_now.waited(time.perf_counter() - begun, 0)
            self._is_steady = False
        return told

    @property
    def _costs_now(self) -> Costs:
        """What passes cost with as many answers as there are."""
        count = len(self.answers)
        return self._costs.setdefault(count, Costs(count))

    def _note(self, costs: Costs, seconds: float, waited: float, drafted: int, tokens: int) -> None:
        """Note what a pass cost, of which so much was waiting for tokens to be read."""
        if drafted:
            costs.checked(drafted, tokens, seconds - waited)
            costs.waited(waited, 0)
        elif waited or (self._is_steady and self._apart and len(self.answers) > 1):
            costs.waited(seconds, tokens)
        elif self._is_steady:
            costs.plain(seconds)

    def _settle_in(self, told: Told) -> int:
        """Let answers without a draft for a while join the batch; return how many."""
        if len(self.answers) == 1:
            return 0
        idle = [one for one in self._apart if one.idle >= _PATIENCE]
        for one in idle:
            self._apart.remove(one)
            try:
                self._join_batch(one.answer, one.cache, one.token)
            except Exception as error:  # of this answer alone
                told.append((one.answer.number, one.answer.fail(error)))
        return len(idle)

    def _part(self) -> int:
        """Let rows that are seen to copy go apart, where drafts pay for them; return how many."""
        batch, room_apart = self._batch, self._drafted - len(self._apart)
        if batch is None or not room_apart or not self._may_pay():
            return 0
        copying = []
        for row, answer in enumerate(self._answers):
            if answer is not None and answer.lookup is not None:
                answer.lookup.saw(batch.ids[row])
                if answer.lookup.run >= _SURE:
                    copying.append((row, answer, answer.lookup))
        del copying[room_apart:]
        if not copying:
            return 0
        texts = [(one.lookup.odds, one.room) for one in self._apart]
        texts += [(lookup.odds, room(answer, batch.slack)) for _, answer, lookup in copying]
        plan = self._costs_now.plan(texts)[len(self._apart) :]
        parted = 0
        for (row, answer, lookup), most in zip(copying, plan, strict=True):
            if not most:
                continue
            try:
                cache = batch.row(row)
            except Exception:  # there is no room for it, say: it stays where it is
                break
            self._apart.append(Apart(answer, cache, self._tokens[row : row + 1], lookup, is_promising=True))
            self._answers[row] = None
            parted += 1
        return parted

    def _may_pay(self) -> bool:
        """Whether any draft could pay with as many answers as there are."""
        count, left, may = self._looks_up
        if count != len(self.answers) or not left:
            count, left, may = len(self.answers), _ASK, self._costs_now.may_pay(self._drafted)
        self._looks_up = count, left - 1, may
        return may

    def _draft(self, costs: Costs) -> float:
        """Draft where it pays; return the seconds that this took, where tokens were waited for."""
        able = [one for one in self._apart if one.value is not None or one.is_promising]
        plan = costs.plan([(one.lookup.odds, one.room) for one in able]) if able else []
        if not any(plan):
            return 0.0
        begun, must_wait = time.perf_counter(), any(one.value is None for one in able)
        for one, most in zip(able, plan, strict=True):
            if one.value is None:
                one.value = one.token.item()  # type: ignore[assignment]
            assert one.value is not None
            if most:
                one.draft = one.lookup.drafter.draft(one.cache.ids, one.value, most, one.answer.sampler)
        return time.perf_counter() - begun if must_wait else 0.0

    def _advance(self, apart: Sequence[Apart]) -> Told:
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

    def _tell_token(self, one: Apart, following: mx.array) -> Told:
        value: int = one.token.item() if one.value is None else one.value  # type: ignore[assignment]
        one.token, one.value = following, None
        return self._tell_apart(one, [value])

    def _tell_draft(self, one: Apart, logits: mx.array) -> Told:
        assert one.value is not None
        answer, predicted = one.answer, one.lookup.drafter.predicted
        try:
            right, following = settle(logits, one.cache, answer.sampler, one.draft)
        except Exception as error:  # nobody knows what its cache holds now
            self._apart.remove(one)
            return [(answer.number, answer.fail(error))]
        answer.chosen += right + 1
        answer.rejected += max(0, predicted - right)
        one.lookup.odds.checked(len(one.draft), right)
        told = self._tell_apart(one, [one.value, *one.draft[:right]], predicted)
        one.token, one.value = mx.array([following]), following
        return told

    def _tell_apart(self, one: Apart, tokens: Sequence[int], predicted: int = 0) -> Told:
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

    def _retire_apart(self, one: Apart) -> None:
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
