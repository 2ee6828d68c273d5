"""Matches regular expressions in a `m7mlx.worker.Worker`; needs the standard library alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable


def handler(setup: bytes) -> Callable[[bytes], bytes]:
    """Return the function that answers [patterns, names]; there is nothing to set up."""
    return _match


def _match(question: bytes) -> bytes:
    """Return the numbers of the patterns found in each name, or else the error of a pattern."""
    patterns, names = json.loads(question)
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
        found = [[i for i, pattern in enumerate(compiled) if pattern.search(name)] for name in names]
    except (re.error, RecursionError, OverflowError) as error:
        return json.dumps(str(error) or "it is nested too deep").encode()
    return json.dumps(found).encode()
