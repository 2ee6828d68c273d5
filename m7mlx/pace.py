"""When to draft and how much: speculation that pays its way, or stops."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

MAX_DRAFT = 15  # with the token before it 16 queries: beyond, a pass costs more than it is worth


class Odds:
    """How often what is drafted for one text is right.

    is_copying  whether the last draft, or guess, was right to its end
    """

    _PRIOR = (1.4, 0.6)

    def __init__(self) -> None:
        # Drafted tokens that were right and wrong, as if two had been tried: at the beginning of a
        # copy, and within it.
        self._counts = {False: list(self._PRIOR), True: list(self._PRIOR)}
        self.is_copying = False

    @classmethod
    def best(cls) -> Odds:
        """Odds of a text whose drafts are nearly always right."""
        odds = cls()
        for _ in range(2):  # at the beginning of a copy, and within it
            odds.checked(19, 19)
        return odds

    @property
    def chance(self) -> float:
        """How likely the next drafted token is right."""
        right, wrong = self._counts[self.is_copying]
        return right / (right + wrong)

    def tokens(self, drafted: int) -> float:
        """How many tokens a pass over a draft gives, on average, with the one after the draft."""
        a = self.chance
        return (1 - a ** (drafted + 1)) / (1 - a)

    def plain(self) -> None:
        """Note that a token was decoded without a draft, with the next pass under way."""
        self.is_copying = False
        for counts in self._counts.values():  # what was learned fades, for other parts of the text
            counts[:] = [n + 0.01 * (prior - n) for n, prior in zip(counts, self._PRIOR, strict=True)]

    def waited(self) -> None:
        """Note that a token was waited for, and nothing was drafted."""
        self.is_copying = False

    def checked(self, drafted: int, accepted: int) -> None:
        """Note that `accepted` tokens of a draft were right."""
        right, wrong = self._counts[self.is_copying]
        self._counts[self.is_copying] = [0.8 * right + accepted, 0.8 * wrong + (accepted < drafted)]
        self.is_copying = accepted == drafted


class Costs:
    """What passes cost that `rows` answers share, and what drafts have won and lost.

    A draft of k tokens, each right with probability a, gives (1 − a^(k+1)) / (1 − a) tokens for one
    pass over k tokens more; plain decoding gives each answer one. Both costs are measured, since
    they differ by backend: a GPU reads its weights once for many queries, a processor without a
    good BLAS gains nothing. Whatever drafts have cost more than plain decoding is entered in an
    account that may not fall below a small share of the time spent, so that even an unlucky text is
    hardly slower.
    """

    _DRAFTS = (1, 3, 7, MAX_DRAFT)
    _SHARE = 0.015  # of all time, that may be lost
    _LOAN = 2.0  # plain passes, to begin with
    _GAIN = 1.05  # times as many tokens a second, at least, of all and of each that has a draft
    _SLOWED = 1.1  # times as long as a plain pass, at most, where an answer has no draft

    def __init__(self, rows: int = 1) -> None:
        self._rows = rows
        self._plain: deque[float] = deque(maxlen=15)  # seconds
        self._checks: dict[int, deque[float]] = {}  # drafted tokens in the pass → seconds
        self._elapsed = self._saved = 0.0  # seconds

    def plan(self, texts: Sequence[tuple[Odds, int]]) -> list[int]:
        """How many tokens to draft for each text, given the most that it has room for."""
        if len(self._plain) < 3:
            return [0] * len(texts)
        one = statistics.median(self._plain)
        likeliest = sorted(range(len(texts)), key=lambda i: -texts[i][0].chance)
        best, most = [0] * len(texts), 0.0
        for k in self._DRAFTS:
            for count in range(1, len(texts) + 1):
                plan = [0] * len(texts)
                for i in likeliest[:count]:
                    plan[i] = max((n for n in self._DRAFTS if n <= min(k, texts[i][1])), default=0)
                gain = self._gain(plan, texts, one)
                if gain > most:
                    best, most = plan, gain
        risk = self._cost(sum(best), one) - one
        is_bearable = self._saved - risk >= -self._LOAN * one - self._SHARE * self._elapsed
        return best if is_bearable else [0] * len(texts)

    def may_pay(self, drafted: int) -> bool:
        """Whether drafts for so many answers would pay if nearly all of them were right."""
        return any(self.plan([(Odds.best(), MAX_DRAFT)] * min(drafted, self._rows)))

    def plain(self, seconds: float) -> None:
        """Note a pass over one token of every answer, with the next under way."""
        self._plain.append(seconds)
        self._elapsed += seconds

    def waited(self, seconds: float, tokens: int) -> None:
        """Note seconds in which the device waited for tokens to be read, and the tokens told."""
        self._enter(seconds, tokens)

    def checked(self, drafted: int, tokens: int, seconds: float) -> None:
        """Note a pass with `drafted` tokens in all drafts, which gave all answers `tokens`."""
        self._checks.setdefault(drafted, deque(maxlen=5)).append(seconds)
        self._enter(seconds, tokens)

    def _gain(self, plan: Sequence[int], texts: Sequence[tuple[Odds, int]], one: float) -> float:
        """How many times as many tokens a second a plan gives; 0 if too few, or unfair."""
        if not any(plan):
            return 0.0
        slower = self._cost(sum(plan), one) / one
        found = [odds.tokens(k) for k, (odds, _) in zip(plan, texts, strict=True) if k]
        if min(found) < self._GAIN * slower or (len(found) < self._rows and slower > self._SLOWED):
            return 0.0
        gain = (self._rows - len(found) + sum(found)) / self._rows / slower
        return gain if gain >= self._GAIN else 0.0

    def _enter(self, seconds: float, tokens: int) -> None:
        self._elapsed += seconds
        if self._plain:
            one = statistics.median(self._plain)
            # Compiling kernels, once, is not a draft's fault; and no gain lasts for ever.
            saved = tokens * one / self._rows - min(seconds, 16 * one)
            self._saved = min(self._saved + saved, 10 * one)

    def _cost(self, drafted: int, one: float) -> float:
        """Estimate the seconds of a pass with `drafted` tokens by those that were measured."""
        known = {0: one} | {n: statistics.median(times) for n, times in self._checks.items()}
        if drafted in known:
            return known[drafted]
        below = max(n for n in known if n < drafted)
        above = min((n for n in known if n > drafted), default=None)
        if above is not None:
            return known[below] + (known[above] - known[below]) * (drafted - below) / (above - below)
        slope = (known[below] - one) / below if below else 0.1 * one / self._rows
        return known[below] + max(slope, 0.0) * (drafted - below)


class Pace:
    """Decides how many tokens to draft for one answer, by costs and odds that it learns."""

    def __init__(self) -> None:
        self._costs, self._odds = Costs(), Odds()

    def plan(self, most: int) -> int:
        """How many tokens to draft, at most `most`; 0 for none."""
        return self._costs.plan([(self._odds, most)])[0]

    def plain(self, seconds: float) -> None:
        """Note that a plain token was decoded, with the next pass under way."""
        self._costs.plain(seconds)
        self._odds.plain()

    def waited(self, seconds: float) -> None:
        """Note that a plain token was decoded, but the device had to wait for it to be read."""
        self._odds.waited()
        self._costs.waited(seconds, 1)

    def checked(self, drafted: int, accepted: int, seconds: float) -> None:
        """Note that a draft was made and checked; `accepted` of its tokens were right."""
        self._odds.checked(drafted, accepted)
        self._costs.checked(drafted, accepted + 1, seconds)
