"""Regular expressions out of files and commands, matched under a clock.

Python's `re` can take longer than the universe for a line of text, and nothing in its process stops it. So it runs in
a process of its own, which can be ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from m7mlx.errors import InputError

_SECONDS = 10.0
_MEMORY = 1 << 30
_PROGRAM = f"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
except (ImportError, OSError, ValueError):
    pass
patterns, names = json.load(sys.stdin)
found = []
try:
    compiled = [re.compile(pattern) for pattern in patterns]
    found = [[i for i, p in enumerate(compiled) if p.search(name)] for name in names]
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    found = str(error) or type(error).__name__
print(json.dumps(found))
"""


def matches(patterns: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """For each name the numbers of the patterns that are found in it, as `re.search` finds them.

    Raises InputError for patterns that are none, or that take too long.
    """
    if not patterns or not names:
        return [[] for _ in names]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM],
            input=json.dumps([list(patterns), list(names)]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise InputError(f"{_which(patterns)}: matching takes more than {_SECONDS:.0f} s; write it simpler") from None
    except ValueError:  # it was ended, for its memory
        raise InputError(f"{_which(patterns)}: matching takes too much memory; write it simpler") from None
    if isinstance(found, str):
        raise InputError(f"{_which(patterns)} is no regular expression: {found}")
    return list(found)


def _which(patterns: Sequence[str]) -> str:
    longest = max(patterns, key=len)
    return repr(longest if len(longest) <= 60 else longest[:59] + "…")
