"""Vectors → what OpenAI's clients read."""

from __future__ import annotations

import base64
import json
from collections.abc import Generator

from m7mlx_serve.answering import Answerer, VectorAnswers, numbers_in_json
from m7mlx_serve.endpoint import ReadRequest
from m7mlx_serve.openai.embeddings import EmbeddingRequest


class EmbeddingAnswers(VectorAnswers):
    """The vectors of one request."""

    def __init__(self, answerer: Answerer, read: ReadRequest) -> None:
        assert isinstance(read.body, EmbeddingRequest)
        super().__init__(answerer, read)
        self._body = read.body

    async def whole(self) -> Generator[str, None, None]:
        """The JSON of all vectors, in pieces."""
        body = self._body
        vectors = await self._answerer.vectors(self._read, body.pooling, body.normalize, body.dimensions)
        return self._written(vectors)

    def _written(self, vectors: list[bytes]) -> Generator[str, None, None]:
        write = _in_base64 if self._body.encoding_format == "base64" else numbers_in_json
        tokens = sum(map(len, self._read.prompts.ids))
        model, usage = json.dumps(self._answerer.model), {"prompt_tokens": tokens, "total_tokens": tokens}
        yield f'{{"object": "list", "model": {model}, "usage": {json.dumps(usage)}, "data": ['
        for i, vector in enumerate(vectors):
            yield f'{", " if i else ""}{{"object": "embedding", "index": {i}, "embedding": {write(vector)}}}'
        yield "]}"


def _in_base64(vector: bytes) -> str:
    return f'"{base64.b64encode(vector).decode()}"'
