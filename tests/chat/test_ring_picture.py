"""The gauge shows what is true: slots, ages and marks are those of the real cache."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from m7mlx_chat.events import Ready, Seen
from m7mlx_chat.loaded import _described
from m7mlx_chat.widgets import ring
from models import small_config, small_model
from textual.color import Color

from m7mlx.memory import UNDO_SLACK
from m7mlx.units import in_gigabytes


@given(st.integers(1, 60), st.integers(0, 300))
def test_one_cell_a_slot_is_the_age_of_what_lies_there(capacity: int, tokens: int) -> None:
    slots: list[int | None] = [None] * capacity
    for position in range(tokens):
        slots[position % capacity] = position
    expected = [None if position is None else float(tokens - 1 - position) for position in slots]
    assert ring.ages(tokens, capacity, capacity) == expected


@given(st.integers(1, 500), st.integers(0, 3000), st.integers(1, 120))
def test_a_cell_of_many_slots_is_as_young_as_the_youngest(capacity: int, tokens: int, cells: int) -> None:
    single = ring.ages(tokens, capacity, capacity)
    for cell, age in enumerate(ring.ages(tokens, capacity, cells)):
        first, end = cell * capacity // cells, max(cell * capacity // cells + 1, (cell + 1) * capacity // cells)
        there = [a for a in single[first:end] if a is not None]
        assert age == (min(there) if there else None)


def drawn(ready: Ready, tokens: int, width: int = 60) -> str:
    seen = Seen(tokens, 545_000_000, 0)
    assert ready.window is not None and ready.capacity is not None
    text = ring._rolling(ready, seen, ready.window, ready.capacity, width, Color(0, 0, 255), Color(0, 0, 50))
    return text.plain


READY = Ready(window=4096, capacity=4160, context=32768, nbytes=1, token_bytes=131072)


@pytest.mark.parametrize("tokens", [0, 1, 100, 4096, 4097, 4160, 4161, 8000, 131_072, 10_000_000])
@pytest.mark.parametrize("width", [30, 76, 200])
def test_it_is_drawn_at_every_length_and_width(tokens: int, width: int) -> None:
    lines = drawn(READY, tokens, width).splitlines()
    assert len(lines[1]) == width
    assert f"{tokens:,}" in "\n".join(lines)
    beyond = max(0, tokens - 4096)
    if beyond and width > 60:
        assert f"{beyond:,} beyond the window" in lines[3] and "4,096 seen" in lines[3]
        assert len(lines[3]) == width
    assert lines[1].count("░") == pytest.approx(max(0, 1 - tokens / 4160) * width, abs=1)


def test_the_figures_are_those_of_a_cache_that_has_turned() -> None:
    model = small_model(small_config(sliding_window=16))
    cache = model.new_cache(slack=4)
    for _ in range(50):
        model(mx.array([[1]]), cache)
    ready = Ready(window=16, capacity=20, context=4096, nbytes=1)
    assert cache.rings[0].capacity == ready.capacity
    text = drawn(ready, cache.offset)
    assert "turned 2.50 times" in text
    assert "token 50 goes to slot 10" in text
    assert cache.offset % cache.rings[0].capacity == 10
    assert "34 beyond the window" in text


def test_the_line_of_full_attention_and_of_no_model() -> None:
    full = Ready(window=None, capacity=None, context=8192, nbytes=1, token_bytes=1000)
    assert "context" in ring.gauge(full, Seen(4096, 1_000_000)).plain
    assert "▰▰▰▰▰▰▱▱▱▱▱▱ 4,096/8,192" in ring.gauge(full, Seen(4096, 1_000_000)).plain
    assert ring.gauge(None, Seen(0, 0)).plain == ""
    growing = ring._growing(full, Seen(4096, 1_000_000), 40, Color(0, 0, 255), Color(0, 0, 50)).plain
    assert "4,096 of 8,192" in growing
    assert growing.splitlines()[1].count("█") == 20


@pytest.mark.parametrize("bounded", [None, 64])
def test_both_kinds_of_layers_are_drawn(bounded: int | None) -> None:
    kinds = ("full_attention", "sliding_attention", "sliding_attention")
    model = small_model(small_config(sliding_window=16, layer_types=kinds))
    cache = model.new_cache(slack=4, max_kv_size=bounded)
    model(mx.array([[1] * 50]), cache)
    ready = _described(model, cache, Path())
    assert (ready.sliding, ready.capacity) == ((16, 20), None if bounded is None else 64)
    seen, colors = Seen(50, cache.nbytes), (Color(0, 0, 255), Color(0, 0, 50))
    if bounded is None:
        text = ring._growing(ready, seen, 60, *colors).plain
        assert "every token is seen in a part of the layers: 50 of 4,096" in text
        assert f"growing to {in_gigabytes(ready.most_bytes)}" in text
        long = model.new_cache(slack=UNDO_SLACK)
        for start in range(0, 4096, 512):
            model(mx.array([[1] * 512]), long)
            assert long.offset == start + 512
        assert long.nbytes == ready.most_bytes
    else:
        assert ready.window is not None and ready.capacity is not None
        text = ring._rolling(ready, seen, ready.window, ready.capacity, 60, *colors).plain
    assert "20 slots · turned 2.50 times" in text
