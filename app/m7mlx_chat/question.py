"""What the command line asks: a question from -p, files and standard input, and a schema."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m7mlx.errors import InputError
from m7mlx.paths import user_path
from m7mlx_chat.attach import attached

_MOST_SCHEMA = 4 << 20  # bytes: with white space, twenty times what can be used


def question_of(prompt: str | None, files: Sequence[str] = (), *, may_be_piped: bool = True) -> str:
    """The question from -p, from files and, if it `may_be_piped`, from standard input.

    Raises InputError if there is none.
    """
    parts = [prompt or "", *map(attached, files)]
    if may_be_piped and sys.stdin is not None:
        nothing_else = prompt is None and not files
        if nothing_else or (not sys.stdin.isatty() and _is_pipe_or_file()):
            parts.append(sys.stdin.buffer.read().decode("utf-8", "replace").strip("\n"))
    asked = "\n\n".join(part for part in parts if part.strip())
    if not asked:
        raise InputError('there is no question; give one with -p "…" or pipe it in')
    return asked


def piped_text() -> str:
    """All of standard input, as it is. Raises InputError if there is none."""
    if sys.stdin is None:
        raise InputError('there is no text; give one with -p "…" or pipe it in')
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def _is_pipe_or_file() -> bool:
    """Whether standard input may hold a question.

    That it is no terminal does not say so: it may be /dev/null, under cron, say.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def read_schema(path: Path) -> dict[str, Any]:
    """Read a JSON schema. Raises InputError for a file that holds none."""
    try:
        with open(user_path(path), "rb") as file:
            text = file.read(_MOST_SCHEMA + 1)
        if len(text) > _MOST_SCHEMA:
            raise ValueError(f"it has more than {_MOST_SCHEMA >> 20} MB")
        schema = json.loads(text.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--json-schema: {path} cannot be read ({error})") from None
    if not isinstance(schema, dict):
        raise InputError(f"--json-schema: {path} is not a JSON object")
    return schema
