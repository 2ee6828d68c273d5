"""Unsent text: what stands in the composer, with long pastes and files as one line each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from m7mlx.terminal import visible
from m7mlx.units import counted

_FOLD_CHARACTERS, _FOLD_LINES = 4_000, 40


@dataclass(frozen=True)
class UnsentText:
    """A message that has not been sent.

    `shown` has a marker in the place of each of the `pastes`.
    """

    shown: str = ""
    pastes: Mapping[str, str] = field(default_factory=dict)

    def message(self) -> str:
        """Unfold all pastes: the text to send.

        What looks like a marker inside a paste stays what it is.
        """
        text = self.shown
        if self.pastes:
            text = re.sub("|".join(map(re.escape, self.pastes)), lambda match: self.pastes[match[0]], text)
        return text.lstrip("\n").rstrip()  # the first line keeps its indentation: it may be code


def joined(texts: Sequence[UnsentText]) -> UnsentText:
    """Join texts to one, with an empty line between; those that say nothing are left out."""
    shown, pastes = [], dict[str, str]()
    for text in texts:
        written = text.shown
        for marker, paste in text.pastes.items():
            if pastes.get(marker, paste) != paste:  # another text has a marker like this
                other = marker_of("text", paste, pastes)
                written, marker = written.replace(marker, other), other
            pastes[marker] = paste
        shown.append(written)
    return UnsentText("\n\n".join(filter(str.strip, shown)), pastes)


def is_long(text: str) -> bool:
    """Whether a text is folded."""
    return len(text) >= _FOLD_CHARACTERS or text.count("\n") + 1 >= _FOLD_LINES


def folded(text: str) -> UnsentText:
    """A text to edit; folded whole where it is long."""
    if not is_long(text):
        return UnsentText(text)
    marker = marker_of("text", text, {})
    return UnsentText(marker, {marker: text})


def marker_of(name: str, text: str, taken: Mapping[str, str]) -> str:
    """The line that stands for a text; unlike those of other texts that are `taken`."""
    lines = text.count("\n") + 1
    name = visible(name)
    while taken.get(marker := f"[{name}: {counted(len(text), 'character')}, {counted(lines, 'line')}]", text) != text:
        name += "\N{PRIME}"
    return marker
