"""What is taken out of the conversation shown: files, and texts for the clipboard."""

from __future__ import annotations

import os
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx.units import counted
from m7mlx_chat.clipboard import code_blocks
from m7mlx_chat.files import free_name, write_new
from m7mlx_chat.portable import to_json
from m7mlx_chat.portable.page import to_html, to_markdown
from m7mlx_chat.session import Session

_FORMATS = ("md", "html", "json")


def export(session: Session, argument: str) -> Path:
    """Write the conversation to a new file, as `/export [md | html | json] [FILE]` says.

    Returns the file. Raises InputError where there is nothing to write, or the file exists.
    """
    if session.conversation is None:
        raise InputError("there is nothing to export yet")
    first, _, rest = argument.partition(" ")
    kind, name = (first, rest.strip()) if first in _FORMATS else ("", argument)
    head = session.store.conversation(session.conversation)
    suffix = Path(name).suffix.removeprefix(".")
    kind = kind or (suffix if suffix in _FORMATS else "md")
    path = Path(os.path.expanduser(name)) if name else free_name(Path.cwd(), head.title, f".{kind}")
    if kind == "json":
        text = to_json(session.store.tree(head.id))
    else:
        text = (to_html if kind == "html" else to_markdown)(head, session.branch)
    write_new(path, text)
    return path


def text_to_copy(session: Session, argument: str) -> tuple[str, str]:
    """What `/copy [N | all]` copies, and what to call it. Raises InputError for nothing."""
    if argument == "all" and session.conversation is not None:
        return to_markdown(session.store.conversation(session.conversation), session.branch), "the conversation"
    answers = [m for m in map(session.message, session.line) if m.role == "assistant" and m.text]
    if not answers:
        raise InputError("there is no answer yet")
    if not argument:
        return answers[-1].text, "the answer"
    if not argument.isdecimal():
        raise InputError("/copy takes nothing, the number of a code block, or all")
    return code_block(answers[-1].text, int(argument))


def code_block(text: str, number: int) -> tuple[str, str]:
    """A code block of a message, counted from 1, and what to call it. Raises InputError."""
    blocks = code_blocks(text)
    if not blocks:
        raise InputError("there is no code in it")
    if not 1 <= number <= len(blocks):
        raise InputError(f"it has {counted(len(blocks), 'code block')}")
    return blocks[number - 1], f"code block {number} of {len(blocks)}"
