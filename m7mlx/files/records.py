"""Small JSON files in the cache folder that remember what was found out once.

A record that cannot be read is empty, and one that cannot be written is left as it was: then the
work is done again the next time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from m7mlx.errors import DiskError
from m7mlx.files.disk import write_whole
from m7mlx.paths import cache_dir


def read_record(name: str) -> dict[str, Any]:
    """Read the record in the file called `name`."""
    try:
        found = json.loads((cache_dir() / name).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_record(name: str, record: Mapping[str, Any]) -> None:
    """Write the record in the file called `name`, if that is possible."""
    with contextlib.suppress(OSError, DiskError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        write_whole(cache_dir() / name, json.dumps(dict(record)))
