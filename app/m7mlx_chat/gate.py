"""The gate between the chat and the terminal: all that any widget shows goes through it."""

from __future__ import annotations

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from m7mlx.terminal import make_safe


class Gate(LineFilter):
    """Lets no control character, bidi control or link of a text through.

    Textual has each widget's lines pass its filters, with borders and titles, before it adds its
    own sequences.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return make_safe(segment for segment in segments if not segment.control)
