"""Markdown as a model means it: nothing it wrote is left out, and nothing is obeyed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from textual.widgets import Markdown

from m7mlx.terminal import visible

# Textual parses the last block anew with every piece that comes: what is complete goes into a
# widget of its own.
PART, LONGEST = 3_000, 12_000  # characters: of a part, and of a block that is still parsed
ROWS = 60  # of a table that is still drawn as one: each of its cells is a widget
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
# may go on what stands before the blank line
_INSIDE = re.compile(r"[ \t]|[-*+][ \t]|\d{1,9}[.)][ \t]|>|\|")


class Part(NamedTuple):
    """A piece of an answer that renders by itself.

    plain  too long a block to be parsed, shown as it is
    fence  the code fence that is still open at its end, if the piece is plain
    """

    text: str
    plain: bool = False
    fence: str = ""


def answer_markdown() -> Markdown:
    """An empty widget for a part.

    Empty at first: a stream that began with half a code fence would never mend.
    """
    return Markdown("", open_links=False, parser_factory=_parser)


def parts(text: str, fence: str = "") -> list[Part]:
    """An answer as parts, each of whole blocks. A rest may begin inside the code fence `fence`."""
    found: list[Part] = []
    current, plain = "", bool(fence)  # a block that began in a plain part stays plain to its end
    safe, blank, rows = 0, False, 0  # where a block ends in `current`; rows of a table after that
    for line in _lines(text):
        if blank and not fence and line.strip() and not _INSIDE.match(line):
            safe, rows = len(current), 0
            if safe >= PART and not plain:
                found.append(Part(current))
                current, safe = "", 0
        rows = rows + 1 if "|" in line and not fence else 0
        if len(current) + len(line) > LONGEST or rows > ROWS:
            if safe and not plain:
                found.append(Part(current[:safe]))
                current = current[safe:]
            if len(current) + len(line) > LONGEST or rows > ROWS:
                found.append(Part(current, plain=True, fence=fence))
                current, plain, rows = "", bool(fence), 0
            safe = 0
        current += line
        fence = _fence_after(line, fence)
        blank = not line.strip()
        if plain and not fence:
            found.append(Part(current, plain=True))
            current, plain, safe = "", False, 0
    if current:
        found.append(Part(current, plain, fence if plain else ""))
    return found


def _lines(text: str) -> Iterator[str]:
    """Its lines with their ends, the longest ones cut."""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), LONGEST):
            yield line[start : start + LONGEST]


def _fence_after(line: str, fence: str) -> str:
    """The code fence that is open after a line, "" for none."""
    if not (found := _FENCE.match(line)):
        return fence
    marks, rest = found.groups()
    if not fence:
        return marks if marks[0] == "~" or "`" not in rest else ""
    return "" if marks.startswith(fence) and not rest.strip() else fence


def _parser() -> MarkdownIt:
    # Textual shows no HTML: parsed as such, `vector<int>`, <think> and whole <div> blocks would
    # disappear.
    parser = MarkdownIt("gfm-like", {"html": False})
    parser.core.ruler.push("m7mlx", _finish_text)
    return parser


def _finish_text(state: StateCore) -> None:
    """Keep line breaks (of a poem, say), and make what `&#x202e;` has become visible."""
    for block in state.tokens:
        for token in block.children or ():
            if token.type == "softbreak":
                token.type = "hardbreak"
            token.content = visible(token.content)
