"""Nothing a model prints is obeyed by a terminal, however its output is cut."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m7mlx.terminal import visible

controls = st.sampled_from(
    [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\u202e", "\u2066", "\u2028", "]52;c;", "a"]
)


@given(st.lists(controls | st.text(max_size=5)).map("".join), st.integers(0, 40))
def test_no_control_survives_and_cuts_do_not_matter(text: str, cut: int) -> None:
    shown = visible(text)
    assert visible(text[:cut]) + visible(text[cut:]) == shown
    assert visible(shown) == shown
    allowed = {"\n", "\t"}
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in allowed]
    assert not [
        c
        for c in shown
        if unicodedata.bidirectional(c) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    ]
    assert len(shown) == len(text.replace("\r", ""))  # shown as a symbol, not swallowed


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("\x1b]52;c;ZXZpbA==\x07", "␛]52;c;ZXZpbA==␇"),
        ("\x1b[2J\x9b31m", "␛[2J␦31m"),
        ("a\r\nb\tc\x7f", "a\nb\tc␡"),
        ("عربي, עברית, 👩‍👩‍👧 and é stay", "عربي, עברית, 👩‍👩‍👧 and é stay"),
    ],
)
def test_examples(printed: str, shown: str) -> None:
    assert visible(printed) == shown
