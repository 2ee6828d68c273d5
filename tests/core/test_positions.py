"""Where tokens stand: masks, rotations and slots, each against the plainest way to say the same."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m7mlx.errors import RollbackError
from m7mlx.positions import ForwardPass, Positions, Span, window_mask
from m7mlx.rope import Rope
from m7mlx.rotation import Rotation

positions = st.lists(st.integers(-3, 30), min_size=1, max_size=12)


@given(positions, positions, st.none() | st.integers(1, 9))
@settings(deadline=None)
def test_a_query_sees_the_last_keys_and_itself(queries: list[int], keys: list[int], window: int | None) -> None:
    mask = window_mask(mx.array(queries), mx.array(keys), window).tolist()
    assert mask == [[k >= 0 and k <= q and (window is None or k > q - window) for k in keys] for q in queries]


def test_each_row_of_a_batch_has_a_mask_of_its_own() -> None:
    queries, keys = mx.array([[5, 6], [1, 2]]), mx.array([[3, 4, 5, 6], [-1, 0, 1, 2]])
    mask = window_mask(queries, keys, 3)
    for row in range(2):
        assert mx.array_equal(mask[row], window_mask(queries[row], keys[row], 3))


@given(st.lists(st.integers(0, 500), min_size=1, max_size=6), st.integers(1, 3))
@settings(deadline=None)
def test_any_position_can_be_rotated_to(places: list[int], batch: int) -> None:
    x = mx.random.normal((batch, 2, len(places), 16), key=mx.random.key(1))
    found = Rotation(Rope(1e4, 16), 0, np.array([places])).rotate_by_tables(x)
    for i, place in enumerate(places):
        expected = mx.fast.rope(x[:, :, i : i + 1], 16, traditional=False, base=1e4, scale=1.0, offset=place)
        assert mx.allclose(found[:, :, i : i + 1], expected, atol=1e-4)


def standing(window: int | None, slack: int, n_sinks: int = 0) -> Positions:
    return Positions((Span(window, slack, n_sinks),), Rope(1e4, 4))


def described_pass(here: Positions, length: int) -> ForwardPass:
    [described] = here.forward_passes(length)
    return described


def write(slots: dict[int, int], here: Positions, count: int) -> Positions:
    """Write `count` tokens as a ring does: a slot holds what was written into it last."""
    here = here.begun(count)
    slots |= {position % here.spans[0].capacity: position for position in range(here.offset, here.offset + count)}
    return here.advanced(count)


@given(st.integers(1, 9), st.integers(0, 4), st.lists(st.integers(-6, 12), max_size=20))
@settings(deadline=None)
def test_what_can_be_undone_lies_in_its_slots_still(window: int, slack: int, moves: list[int]) -> None:
    slots: dict[int, int] = {}
    here = standing(window, slack)
    for move in moves:
        if move >= 0:
            here = write(slots, here, move)
        elif -move <= here.max_rollback:
            here = here.rolled_back(-move)
        else:
            with pytest.raises(RollbackError):
                here.rolled_back(-move)
        for undone in range(here.max_rollback + 1):
            following = here.offset - undone
            seen = range(max(0, following - window + 1), following)
            assert [slots[position % here.spans[0].capacity] for position in seen] == list(seen)


@given(
    st.integers(1, 9) | st.none(), st.integers(0, 4), st.lists(st.integers(0, 20), min_size=1, max_size=4), st.data()
)
@settings(deadline=None)
def test_a_row_sees_its_own_window_and_nothing_else(
    window: int | None, slack: int, lengths: list[int], data: st.DataObject
) -> None:
    """Masks for rows of any lengths on one clock, against each row's own positions."""
    time = max(lengths)
    here = standing(window, slack).at(time, starts=[time - length for length in lengths])
    slots = {t % here.spans[0].capacity: t for t in range(time)}
    length = data.draw(st.integers(1, 12), label="length")
    described = described_pass(here, length)
    end = time + length
    if described.in_place:
        write(slots, here, length)
        keys = [slots[slot] for slot in range(len(slots))]
    else:
        keys = list(range(described.first, end))
    expected = [
        [
            [start <= key <= query and (window is None or key > query - window) for key in keys]
            for query in range(time, end)
        ]
        for start in here.starts
    ]
    mask = described.mask
    if isinstance(mask, str):
        assert mask == "causal"
        mask = window_mask(mx.arange(time, end), mx.arange(end), None)
    shown = np.broadcast_to(np.array(mask), (len(lengths), 1, length, len(keys)))[:, 0]
    assert shown.tolist() == expected
    own = described.rotation.offset
    assert np.broadcast_to(np.array(own), len(lengths)).tolist() == lengths


@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 50), st.integers(0, 200))
@settings(deadline=None)
def test_a_clock_goes_forward_by_whole_turns(window: int, slack: int, time: int, wanted: int) -> None:
    here = standing(window, slack).at(time, time + 1, [0, min(time, 3)])
    later = here.turned_to(wanted)
    moved = later.offset - here.offset
    assert later.offset >= max(time, wanted) and moved % here.spans[0].capacity == 0
    assert moved == 0 or later.offset - here.spans[0].capacity < wanted
    assert later.lost == here.lost
    assert [later.offset - start for start in later.starts] == [time, time - min(time, 3)]


def test_every_change_is_a_new_value() -> None:
    here = standing(5, 2)
    for later in (here.begun(3), here.advanced(3), here.at(9, starts=[1, 2])):
        assert later != here
    assert here == standing(5, 2)
    assert hash(here.at(7).at(0)) == hash(here)


@given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 4))
@settings(deadline=None)
def test_one_token_traced_is_one_token_described(offset: int, window: int, slack: int) -> None:
    """Both have the same slot and the same rotation, and see the same of all slots."""
    here = standing(window, slack).at(offset, starts=[0, min(offset, 3)])
    described, [span] = described_pass(here, 1), here.spans
    starts, tables = mx.array(here.starts)[:, None], described.rotation.tables
    traced = here.traced_pass(mx.array([offset]), starts, span.capacity, span, tables)
    assert traced.slot is not None and traced.slot.item() == offset % here.spans[0].capacity
    x = mx.random.normal((2, 3, 1, 4), key=mx.random.key(0))
    assert mx.allclose(traced.rotate(x), described.rotate(x), atol=1e-5)
    filled = min(offset + 1, here.spans[0].capacity)
    seen = np.array(traced.mask)
    assert not seen[..., filled:].any()
    mask = described.mask
    expected = np.ones(filled, bool) if isinstance(mask, str) else np.array(mask)
    assert (seen[..., :filled] == expected).all()
