"""The text of a PDF, read in a process of its own (`m7mlx.worker`).

What a PDF takes cannot be known before it is tried.
"""

from __future__ import annotations

import json
from pathlib import Path

from m7mlx.errors import InputError, WorkerError
from m7mlx.worker import Worker
from m7mlx_chat.files import read_bounded

_MOST_BYTES, _MEMORY, _SECONDS = 50_000_000, 1 << 30, 60.0


def read_pdf(path: Path) -> str:
    """A PDF's text, page by page. Raises InputError."""
    data = read_bounded(path, _MOST_BYTES)
    worker = Worker("m7mlx_chat.pdf_process", memory=_MEMORY)
    try:
        reply = json.loads(worker.ask(data, seconds=_SECONDS))
    except WorkerError as error:
        raise InputError(f"{path} cannot be read as a PDF ({error})") from None
    finally:
        worker.close()
    if "error" in reply:
        raise InputError(f"{path} {reply['error']}")
    text: str = reply["text"]
    return text
