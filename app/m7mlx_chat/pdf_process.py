"""What reads a PDF, in the process that `m7mlx_chat.pdf` starts."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable

from pypdf import PdfReader
from pypdf.errors import PyPdfError

from m7mlx_chat.files import MOST_BYTES


def handler(setup: bytes) -> Callable[[bytes], bytes]:
    """The function from a PDF to its text, or to an error, as JSON."""
    logging.disable(logging.CRITICAL)  # what is odd in a PDF is nobody's concern
    return _read


def _read(data: bytes) -> bytes:
    try:
        reply = _pages(data)
    except (PyPdfError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        reply = {"error": "is damaged, or no PDF"}
    return json.dumps(reply).encode()


def _pages(data: bytes) -> dict[str, str]:
    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        return {"error": "is protected by a password"}
    pages: list[str] = []
    size = 0
    for number, page in enumerate(reader.pages, 1):
        text = page.extract_text().strip()
        size += len(text.encode("utf-8", "replace"))
        if size > MOST_BYTES:
            return {"error": f"has more than {MOST_BYTES / 1e6:.0f} MB of text; give a part of it"}
        if text:
            pages.append(f"[page {number}]\n{text}")
    if not pages:
        return {"error": "has no text: its pages are pictures, which this program cannot read"}
    return {"text": "\n\n".join(pages).encode("utf-8", "replace").decode()}
