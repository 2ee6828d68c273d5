"""What a tool gave, as text for the model: as much of it as a conversation can bear."""

from __future__ import annotations

import json
from typing import Any

from m7mlx.errors import ChatFormatError
from m7mlx.terminal import one_line
from m7mlx.tokens.messages import parse_json

MOST = 20_000  # characters of a result that the model is told, and that are kept


def text_of(result: Any) -> str:
    """The text of a `CallToolResult`; what is no text is named."""
    parts = [_part(block) for block in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return bounded("\n".join(parts))


def bounded(text: str) -> str:
    """The beginning of a text, and how much was left out; harmless as JSON."""
    if len(text) > MOST:
        text = f"{text[:MOST]}\n… ({len(text) - MOST:,} more characters were left out)"
    try:
        parse_json(text)
    except ChatFormatError:  # chat formats read results as JSON: as a text it nests nothing
        return f"Text:\n{text}"
    return text


def _part(block: Any) -> str:
    match block.type:
        case "text":
            return str(block.text)
        case "image" | "audio":
            size = len(block.data) * 3 // 4
            return f"[{block.type}, {one_line(block.mime_type)[:60]}, {size:,} bytes: not shown to the model]"
        case "resource_link":
            return f"[resource {one_line(str(block.uri))[:500]}]"
        case "resource":
            text = getattr(block.resource, "text", None)
            if isinstance(text, str):
                return text
            return f"[resource {one_line(str(block.resource.uri))[:500]}: not shown to the model]"
    return f"[{one_line(str(block.type))[:60]}: not shown to the model]"
