"""Markdown as a model means it: nothing it wrote is left out, and nothing it wrote is obeyed."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from textual.widgets import Markdown

from m7mlx_chat.terminal import visible


def answer_markdown() -> Markdown:
    """An empty widget for an answer. Empty at first: a stream that began with half a code fence would never mend."""
    return Markdown("", open_links=False, parser_factory=_parser)


def _parser() -> MarkdownIt:
    # Textual shows no HTML: parsed as such, `vector<int>`, <think> and whole <div> blocks would disappear.
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
