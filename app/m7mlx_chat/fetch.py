"""Fetch a model in a process of its own: `python -m m7mlx_chat.fetch NAME`.

The chat reads its progress, one JSON object a line, and can kill it at any moment: the next one
goes on from there.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from m7mlx.errors import M7Error
from m7mlx.files.hub import resolve

_EVERY = 0.2  # seconds between two lines


def main(name: str) -> int:
    """Fetch a model and print where it lies; return the exit status."""
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last > _EVERY:
            last = time.monotonic()
            _print("progress", done=done, total=total)

    try:
        _print("result", folder=str(resolve(name, progress=progress)))
    except (M7Error, OSError, ValueError) as error:  # the last: a name that the Hub refuses
        _print("error", message=" ".join(str(error).split()))
        return 1
    return 0


def _print(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event} | fields), flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
