"""When to draft and how much: speculation that pays its way, or stops."""

from __future__ import annotations

import statistics
from collections import deque

MAX_DRAFT = 15  # with the token before it 16 queries: beyond, a pass costs more than it is worth


class Pace:
    """Decides how many tokens to draft, by what passes cost and how much of the drafts was right.

    A draft of k tokens, each right with probability a, gives (1 − a^(k+1)) / (1 − a) tokens for one
    pass over k + 1; plain decoding gives one for a pass over one. Both costs are measured, since
    they differ by backend: a GPU reads its weights once for many queries, a processor without a
    good BLAS gains nothing. Whatever a draft has cost more than plain decoding is entered in an
    account that may not fall below a small share of the time spent, so that even an unlucky text is
    hardly slower.
    """

    _DRAFTS = (1, 3, 7, MAX_DRAFT)
    _SHARE = 0.015  # of all time, that may be lost
    _LOAN = 2.0  # plain passes, to begin with
    _PRIOR = (1.4, 0.6)

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=15)  # seconds
        self._checks: dict[int, deque[float]] = {}  # queries in the pass → seconds
        # Drafted tokens that were right and wrong, as if two had been tried: at the beginning of a
        # copy, and within it.
        self._odds = {False: list(self._PRIOR), True: list(self._PRIOR)}
        self._copying = False  # the last draft was right to its end
        self._elapsed = self._saved = 0.0  # seconds

    def plan(self, most: int) -> int:
        """How many tokens to draft, at most `most`; 0 for none."""
        if len(self._plain) < 3:
            return 0
        one = statistics.median(self._plain)
        right, wrong = self._odds[self._copying]
        a = right / (right + wrong)
        gains = {k: (1 - a ** (k + 1)) / (1 - a) * one / self._cost(k + 1, one) for k in self._DRAFTS if k <= most}
        best = max(gains, key=gains.__getitem__, default=0)
        if not best or gains[best] < 1.05:
            return 0
        risk = self._cost(best + 1, one) - one
        return best if self._saved - risk >= -self._LOAN * one - self._SHARE * self._elapsed else 0

    def plain(self, seconds: float) -> None:
        """Note that a plain token was decoded, with the next pass under way."""
        self._plain.append(seconds)
        self._elapsed += seconds
        self._copying = False
        for odds in self._odds.values():  # what was learned fades, for other parts of the text
            odds[:] = [n + 0.01 * (prior - n) for n, prior in zip(odds, self._PRIOR, strict=True)]

    def waited(self, seconds: float) -> None:
        """Note that a plain token was decoded, but the device had to wait for it to be read."""
        self._copying = False
        self._enter(seconds, 1)

    def checked(self, drafted: int, accepted: int, seconds: float) -> None:
        """Note that a draft was made and checked; `accepted` of its tokens were right."""
        self._checks.setdefault(drafted + 1, deque(maxlen=5)).append(seconds)
        right, wrong = self._odds[self._copying]
        self._odds[self._copying] = [0.8 * right + accepted, 0.8 * wrong + (accepted < drafted)]
        self._copying = accepted == drafted
        self._enter(seconds, accepted + 1)

    def _enter(self, seconds: float, tokens: int) -> None:
        self._elapsed += seconds
        if self._plain:
            one = statistics.median(self._plain)
            # Compiling kernels, once, is not a draft's fault; and no gain lasts for ever.
            self._saved = min(self._saved + tokens * one - min(seconds, 16 * one), 10 * one)

    def _cost(self, queries: int, one: float) -> float:
        """Estimate the seconds of a pass over `queries` tokens by those that were measured."""
        known = {1: one} | {n: statistics.median(times) for n, times in self._checks.items()}
        if queries in known:
            return known[queries]
        below = max(n for n in known if n < queries)
        above = min((n for n in known if n > queries), default=None)
        if above is not None:
            return known[below] + (known[above] - known[below]) * (queries - below) / (above - below)
        slope = (known[below] - one) / (below - 1) if below > 1 else 0.1 * one
        return known[below] + max(slope, 0.0) * (queries - below)
