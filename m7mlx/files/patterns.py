"""Regular expressions out of files and commands, matched under a clock.

Python's `re` can take for ever on one line of text, and nothing in its own process can stop it. So
it runs in another one (`m7mlx/files/patterns_process.py`), which the operating system bounds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from m7mlx.errors import InputError, WorkerError, WorkerTimeError
from m7mlx.worker import Worker

_SECONDS = 10.0
_MEMORY = 1 << 30


def match_patterns(patterns: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """Return for each name the numbers of the patterns that `re.search` finds in it.

    Raises InputError for what is no regular expression, or takes too much time or memory.
    """
    if not patterns or not names:
        return [[] for _ in names]
    longest = max(patterns, key=len)
    shown = repr(longest if len(longest) <= 60 else longest[:59] + "…")
    question = json.dumps([list(patterns), list(names)]).encode()
    try:
        with Worker("m7mlx.files.patterns_process", memory=_MEMORY) as worker:
            found = json.loads(worker.ask(question, _SECONDS))
    except WorkerTimeError:
        raise InputError(f"{shown}: matching takes more than {_SECONDS:.0f} s; write it simpler") from None
    except WorkerError:
        raise InputError(f"{shown}: matching takes too much memory; write it simpler") from None
    if isinstance(found, str):
        raise InputError(f"{shown} is no regular expression: {found}")
    return list(found)
