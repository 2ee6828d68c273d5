"""What differs between two texts, word by word."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from rich.text import Text

_MOST_WORDS = 3_000  # of both texts together are compared word by word, of more line by line
_WORDS, _LINES = re.compile(r"\s+|\w+|[^\w\s]"), re.compile(r"[^\n]*\n|[^\n]+")


def differences(before: str, after: str) -> tuple[Text, Text]:
    """Both texts, with what only one of them has marked in it."""
    one, other = _WORDS.findall(before), _WORDS.findall(after)
    if len(one) + len(other) > _MOST_WORDS:
        one, other = _LINES.findall(before), _LINES.findall(after)
    left, right = Text(), Text()
    for kind, a, b, c, d in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        left.append("".join(one[a:b]), None if kind == "equal" else "bold red underline")
        right.append("".join(other[c:d]), None if kind == "equal" else "bold green underline")
    return left, right
