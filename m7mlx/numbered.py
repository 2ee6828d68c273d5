"""Answers among others, and what is looked up for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from m7mlx.answer import Answer
from m7mlx.cache import RollingCache
from m7mlx.model import Mistral
from m7mlx.pace import MAX_DRAFT, Odds
from m7mlx.request import Request
from m7mlx.speculative import PromptLookup
from m7mlx.tokens.tokenizer import Tokenizer


class NumberedAnswer(Answer):
    """An answer among others.

    error   why its next token could not be chosen; chosen, how many were before that
    lookup  what is looked up for it; None where nothing is
    """

    def __init__(self, number: int, request: Request, model: Mistral, tokenizer: Tokenizer) -> None:
        super().__init__(request, model, tokenizer)
        self.number = number
        self.error: Exception | None = None
        self.chosen = 0
        self.lookup: Lookup | None = None

    @property
    def may_be_drafted(self) -> bool:
        """Whether its tokens are the same when several are looked at in one pass."""
        return self.sampler.looks_ahead and self.request.max_tokens != 1


class Lookup:
    """What drafts for an answer would be worth, found out by guessing while none are made.

    run  how many guesses have been right without one that was wrong or missing
    """

    def __init__(self, drafter: PromptLookup, ids: Sequence[int]) -> None:
        """Begin an answer that follows `ids`."""
        self.drafter, self.odds, self.run = drafter, Odds(), 0
        self._guess, self._at = -1, 0  # how many ids there were before it
        drafter.begin(ids)

    def saw(self, ids: Sequence[int]) -> None:
        """Compare the guess with the token that came, the last of `ids`, and guess the next one."""
        if self._guess >= 0 and self._at == len(ids) - 1:
            is_right = self._guess == ids[-1]
            self.odds.checked(1, int(is_right))
            self.run = self.run + 1 if is_right else 0
        else:
            self.odds.plain()
            self.run = 0
        self._guess, self._at = self.drafter.guess(ids), len(ids)


@dataclass(eq=False)
class Apart:
    """An answer in a cache of its own.

    token         chosen [1], and not in the cache yet; `value`, if it has been read
    is_promising  whether a draft may be found once the token is known
    draft         what is looked at together with the token in this step
    idle          steps since the last draft
    """

    answer: NumberedAnswer
    cache: RollingCache
    token: mx.array
    lookup: Lookup
    value: int | None = None
    is_promising: bool = False
    draft: list[int] = field(default_factory=list)
    idle: int = 0

    @property
    def room(self) -> int:
        """The most tokens of a draft: all of them can be undone, and the answer may have them."""
        return room(self.answer, self.cache.slack)


def room(answer: NumberedAnswer, slack: int) -> int:
    """The most tokens of a draft for an answer, where so many can be undone."""
    return min(MAX_DRAFT, slack - 1, MAX_DRAFT if answer.left is None else answer.left - 1)
