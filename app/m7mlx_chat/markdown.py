"""Markdown as a model means it: nothing it wrote is left out, and nothing is obeyed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.escape import escape
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.texmath import texmath_plugin
from textual.content import Content
from textual.widgets import Markdown
from textual.widgets._markdown import MarkdownFence

from m7mlx.terminal import visible
from m7mlx_chat.latex import readable

# Textual parses the last block anew with every piece that comes: what is complete goes into a
# widget of its own.
PART, LONGEST = 3_000, 12_000  # characters: of a part, and of a block that is still parsed
ROWS = 60  # of a table that is still drawn as one: each of its cells is a widget
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
# may go on what stands before the blank line
_INSIDE = re.compile(r"[ \t]|[-*+][ \t]|\d{1,9}[.)][ \t]|>|\|")

_ESCAPED = tuple("*_`#<>|~.-+!$\n")


class Part(NamedTuple):
    """A piece of an answer that renders by itself.

    plain  too long a block to be parsed, shown as it is
    fence  the code fence that is still open at its end, if the piece is plain
    """

    text: str
    plain: bool = False
    fence: str = ""


class CodeBlock(MarkdownFence):
    """A block of code: its language above it, and a bar below lines that are too long."""

    DEFAULT_CSS = """
    CodeBlock {
        border-top: blank; border-title-color: $text-muted; border-title-align: right;
        overflow-x: auto; scrollbar-size-horizontal: 1;
        & > Label { padding: 0 2 1 2; width: auto; min-width: 100%; }
    }
    CodeBlock.-wrapped > Label { width: 100%; }
    """

    def on_mount(self) -> None:
        self.border_title = visible(self.lexer.split(maxsplit=1)[0][:20]) if self.lexer.strip() else ""

    @classmethod
    def highlight(cls, code: str, language: str, ansi: bool = False, dark: bool = False) -> Content:
        words = language.split(maxsplit=1)
        if words and words[0].lower() in ("diff", "patch"):
            return _colored_diff(code)
        return super().highlight(code, language, ansi, dark)


def _colored_diff(code: str) -> Content:
    """What a diff adds and takes away, in colours: Textual's own theme has none for that."""
    styles = {"+": "$text-success", "-": "$text-error", "@": "$text-accent"}
    lines = code.splitlines(keepends=True)
    return Content("").join(Content.styled(line, styles.get(line[:1], "")) for line in lines)


class AnswerMarkdown(Markdown):
    """Markdown as answers have it."""

    BLOCKS = Markdown.BLOCKS | {"fence": CodeBlock, "code_block": CodeBlock}


def answer_markdown() -> Markdown:
    """An empty widget for a part.

    Empty at first: a stream that began with half a code fence would never mend.
    """
    return AnswerMarkdown("", open_links=False, parser_factory=_parser)


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
    parser.use(dollarmath_plugin, allow_space=False, allow_digits=False, allow_labels=False, double_inline=True)
    parser.use(texmath_plugin, delimiters="brackets")
    parser.inline.ruler.at("escape", _unescape)
    parser.core.ruler.push("m7mlx_formulas", _show_formulas)
    parser.core.ruler.push("m7mlx", _finish_text)
    return parser


def _unescape(state: StateInline, silent: bool) -> bool:
    """Take a backslash for Markdown's only before what Markdown obeys: others are LaTeX's, say."""
    return state.src[state.pos + 1 : state.pos + 2] in _ESCAPED and escape(state, silent)


def _show_formulas(state: StateCore) -> None:
    """Make text of formulas: Textual leaves out what it does not know."""
    tokens = []
    for token in state.tokens:
        for child in token.children or ():
            if child.type.startswith("math_"):
                child.type, child.content = "text", readable(child.content)
        if not token.type.startswith("math_block"):
            tokens.append(token)
            continue
        text = Token("text", "", 0, content=readable(token.content))
        inline = Token("inline", "", 0, map=token.map, level=token.level + 1, content=text.content, children=[text])
        begin = Token("paragraph_open", "p", 1, map=token.map, level=token.level, block=True)
        tokens += [begin, inline, Token("paragraph_close", "p", -1, level=token.level, block=True)]
    state.tokens = tokens


def _finish_text(state: StateCore) -> None:
    """Keep line breaks (of a poem, say), and make what `&#x202e;` has become visible."""
    for block in state.tokens:
        for token in block.children or ():
            if token.type == "softbreak":
                token.type = "hardbreak"
            token.content = visible(token.content)
