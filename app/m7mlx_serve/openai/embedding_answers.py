"""Vectors → what OpenAI's clients read."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Iterator
from typing import ClassVar

from m7mlx_serve.answering import Answerer, numbers_in_json
from m7mlx_serve.endpoint import ReadRequest
from m7mlx_serve.openai.embeddings import EmbeddingRequest


class EmbeddingAnswers:
    """The vectors of one request."""

    stream_type: ClassVar[str] = "text/event-stream"

    def __init__(self, answerer: Answerer, read: ReadRequest) -> None:
        assert isinstance(read.body, EmbeddingRequest)
        self._answerer, self._read, self._body = answerer, read, read.body

    async def whole(self) -> Iterator[str]:
        """The JSON of all vectors, in pieces."""
        body = self._body
        vectors = await self._answerer.vectors(self._read, body.pooling, body.normalize, body.dimensions)
        # On a thread: there may be millions of numbers.
        return iter(await asyncio.to_thread(self._written, vectors))

    async def stream(self) -> AsyncGenerator[str, None]:
        """The same: there is nothing to wait for."""
        for text in await self.whole():
            yield text

    def _written(self, vectors: list[bytes]) -> list[str]:
        write = _in_base64 if self._body.encoding_format == "base64" else numbers_in_json
        items = [f'{{"object": "embedding", "index": {i}, "embedding": {write(v)}}}' for i, v in enumerate(vectors)]
        tokens = sum(map(len, self._read.prompts.ids))
        model, usage = json.dumps(self._answerer.model), {"prompt_tokens": tokens, "total_tokens": tokens}
        pieces = [f'{{"object": "list", "model": {model}, "usage": {json.dumps(usage)}, "data": [']
        pieces += [f"{', ' if i else ''}{item}" for i, item in enumerate(items)]
        return [*pieces, "]}"]


def _in_base64(vector: bytes) -> str:
    return f'"{base64.b64encode(vector).decode()}"'
