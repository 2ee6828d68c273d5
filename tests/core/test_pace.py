"""The pace on imagined machines and texts.

It is never much slower, and much faster where guesses are right.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from m7mlx.pace import Pace


def simulate(cost: Callable[[int], float], right: Callable[[int], float], tokens: int, seed: int = 0) -> float:
    """Return the seconds that `tokens` take with a lookup that always finds something.

    Without it they take one second each.
    """
    pace, chance = Pace(), random.Random(seed)
    seconds, done, known = 0.0, 0, False
    while done < tokens:
        noise = chance.uniform(0.95, 1.05)
        planned = pace.plan(15)
        if known and planned:
            drafted = planned
            accepted = next((i for i in range(drafted) if chance.random() > right(done + i)), drafted)
            spent = cost(drafted + 1) * noise
            pace.checked(drafted, accepted, spent)
            done += accepted + 1
        else:
            spent = noise * (1.05 if known or planned else 1.0)  # waiting for a token costs a twentieth
            if known or planned:
                pace.waited(spent)
            else:
                pace.plain(spent)
            known = bool(planned)
            done += 1
        seconds += spent
    return seconds


def gpu(queries: int) -> float:
    return 1 + 0.03 * (queries - 1)


def no_blas(queries: int) -> float:
    return float(queries)


@pytest.mark.parametrize("cost", [gpu, no_blas, lambda n: 1 if n == 1 else 1.5 + 0.02 * n, lambda n: 1.6 * n])
@pytest.mark.parametrize("right", [0.0, 0.1, 0.3])
def test_where_guesses_are_wrong_it_costs_three_percent_at_most(cost: Callable[[int], float], right: float) -> None:
    for seed in range(5):
        assert simulate(cost, lambda at: right, 400, seed) <= 400 * 1.03


@pytest.mark.parametrize(("cost", "least"), [(gpu, 5.0), (lambda n: 1 if n == 1 else 1.5 + 0.02 * n, 3.5)])
def test_where_guesses_are_right_it_pays(cost: Callable[[int], float], least: float) -> None:
    assert 400 / simulate(cost, lambda at: 0.97, 400) > least


def test_it_comes_back_when_the_text_changes() -> None:
    """Free text, then a long quotation, then free text again."""
    seconds = simulate(gpu, lambda at: 0.97 if 400 <= at < 800 else 0.05, 1200)
    assert seconds < 400 * 1.03 + 400 / 3 + 400 * 1.05


def test_no_draft_before_anything_was_measured_nor_without_room() -> None:
    pace = Pace()
    assert pace.plan(15) == 0
    for _ in range(5):
        pace.plain(1.0)
    assert pace.plan(15) == 3
    assert pace.plan(2) == 1
    assert pace.plan(0) == pace.plan(-1) == 0
