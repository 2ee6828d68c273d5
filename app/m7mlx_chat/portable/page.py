"""A conversation to read elsewhere: as Markdown, or as one HTML file that loads and runs nothing.

Control characters become visible symbols in both, as on the screen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from html import escape

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from m7mlx.terminal import visible
from m7mlx_chat.dates import exact_time, full_time
from m7mlx_chat.files import fenced
from m7mlx_chat.steps import Call
from m7mlx_chat.store.rows import Conversation, Message

_NOTES = {
    "complete": "",
    "stopped": "stopped",
    "length": "cut off at the longest length",
    "error": "ended by an error",
    "answering": "under way",
    "interrupted": "interrupted",
}
_PREFIX, _LONGEST_COLOURED = "c-", 100_000  # of classes; characters of a code block
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_PAGE = """\
<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --back: #8881; }}
body {{ font: 1rem/1.6 system-ui, sans-serif; overflow-wrap: anywhere; }}
body {{ max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
article {{ margin: 1.5rem 0; }}
article.user {{ background: var(--back); border-radius: .6rem; padding: .2rem 1rem; }}
.text {{ white-space: pre-wrap; }}
h1 {{ font-size: 1.5rem; }}
time {{ float: right; }}
h2, time, footer, .about {{ font-size: .8rem; font-weight: normal; opacity: .7; margin: .4rem 0; }}
pre {{ background: var(--back); border-radius: .4rem; padding: .8rem; overflow-x: auto; }}
code {{ font-family: ui-monospace, monospace; font-size: .9em; }}
table {{ border-collapse: collapse; }}
td, th {{ border: 1px solid var(--line); padding: .2rem .6rem; }}
blockquote {{ border-left: .2rem solid var(--line); margin-left: 0; padding-left: 1rem; }}
h3 {{ font-size: 1.25rem; }} h4 {{ font-size: 1.1rem; }} h5, h6 {{ font-size: 1rem; }}
{colors}
@media print {{
  :root {{ color-scheme: light; }}
  body {{ max-width: none; margin: 0; font-size: 10.5pt; }}
  pre {{ white-space: pre-wrap; border: 1px solid var(--line); }}
  h2, h3, h4, h5, h6 {{ break-after: avoid; }}
  pre, table, blockquote {{ break-inside: avoid; }}
  article.user {{ border: 1px solid var(--line); }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="about">{about}</p>
{messages}
</body>
</html>
"""


def to_markdown(conversation: Conversation, branch: Sequence[Message]) -> str:
    """A branch of a conversation as Markdown; what was written in it is left as Markdown."""
    parts = [f"# {visible(conversation.title)}", _about(conversation)]
    if conversation.system:
        parts.append("\n".join(f"> {line}" for line in visible(conversation.system).splitlines()))
    for message in branch:
        parts.append("## " + " · ".join(filter(None, [_speaker(message), full_time(message.said_at)])))
        for step in message.steps:
            parts += [_closed(visible(step.text))] if step.text else []
            parts += map(_call_as_markdown, step.calls)
        parts.append(_closed(visible(message.text)))
        if note := _NOTES[message.status]:
            parts.append(f"*({note})*")
    return "\n\n".join(parts) + "\n"


def to_html(conversation: Conversation, branch: Sequence[Message]) -> str:
    """A branch as an HTML page: questions as they were typed, answers as Markdown shows them."""
    # No HTML of a message is HTML of the page, and no picture is fetched: it stays a link.
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "highlight": _highlighted})
    parser.enable(["table", "strikethrough"]).disable("image")
    parser.core.ruler.push("m7mlx_headings", _lower_headings)
    articles = []
    if conversation.system:
        articles.append(f'<article class="system"><h2>System prompt</h2>\n{_plain(conversation.system)}</article>')
    for message in branch:
        # Before for what is written, after for what `&#x202e;` has become.
        answered = message.role == "assistant"
        body = visible(parser.render(visible(message.text))) if answered else _plain(message.text)
        for step in reversed(message.steps):
            said = visible(parser.render(visible(step.text)))
            body = said + "".join(map(_call_as_html, step.calls)) + body
        note = f"<footer>{escape(_NOTES[message.status])}</footer>\n" if _NOTES[message.status] else ""
        articles.append(
            f'<article class="{message.role}">{_when(message)}<h2>{escape(_speaker(message))}</h2>\n'
            f"{body}{note}</article>"
        )
    return _PAGE.format(
        title=escape(visible(conversation.title)),
        about=escape(_about(conversation)),
        messages="\n".join(articles),
        colors=_colors(),
    )


def _call_as_markdown(call: Call) -> str:
    """A call of a tool, and what it gave."""
    return fenced(visible(f"{call.name} {call.arguments}\n\n{call.result or call.outcome}"), "text")


def _call_as_html(call: Call) -> str:
    name, rest = escape(visible(call.name)), escape(visible(f"{call.arguments}\n\n{call.result}"))
    return f"<details><summary>{name} ({call.outcome})</summary>\n<pre>{rest}</pre></details>\n"


def _lower_headings(state: StateCore) -> None:
    """Put the headings of an answer below that of the page and those of the speakers."""
    for token in state.tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"


def _highlighted(code: str, language: str, _: str) -> str:
    """Code with the classes of its language; "" leaves it as it is."""
    if len(code) > _LONGEST_COLOURED:
        return ""
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        return ""
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix=_PREFIX)))


@cache
def _colors() -> str:
    """Rules for the classes, for light pages and for dark ones."""
    light, dark = (
        HtmlFormatter(style=style, classprefix=_PREFIX, nobackground=True).get_style_defs("pre").splitlines()
        for style in ("friendly", "monokai")
    )
    rules = ["\n".join(line for line in lines if f" .{_PREFIX}" in line) for lines in (light, dark)]
    return f"{rules[0]}\n@media screen and (prefers-color-scheme: dark) {{\n{rules[1]}\n}}"


def _plain(text: str) -> str:
    return f'<div class="text">{escape(visible(text))}</div>\n'


def _about(conversation: Conversation) -> str:
    model = " ".join(visible(conversation.model).split())
    return " · ".join(filter(None, [full_time(conversation.created), model, visible(conversation.hashtags)]))


def _when(message: Message) -> str:
    time = full_time(message.said_at)
    return f'<time datetime="{exact_time(message.said_at)}">{time}</time>' if time else ""


def _speaker(message: Message) -> str:
    return "You" if message.role == "user" else " ".join(visible(message.model).split()) or "Answer"


def _closed(text: str) -> str:
    """Close the code block that a broken-off answer left open: it would swallow what follows."""
    fence = ""
    for line in text.splitlines():
        found = _FENCE.match(line)
        if not found:
            continue
        marks, rest = found.groups()
        if not fence:
            fence = marks if marks[0] == "~" or "`" not in rest else ""
        elif marks.startswith(fence) and not rest.strip():
            fence = ""
    return f"{text}\n{fence}" if fence else text
