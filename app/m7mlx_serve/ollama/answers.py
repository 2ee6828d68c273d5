"""Pieces of an answer → lines of JSON, as Ollama's clients read them."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, ClassVar

from m7mlx import Piece, Stats
from m7mlx.answer_reader import AnswerReader, read_arguments
from m7mlx_serve.answering import Answerer, VectorAnswers, numbers_in_json
from m7mlx_serve.endpoint import ReadRequest
from m7mlx_serve.errors import ApiError
from m7mlx_serve.ollama.chat import OllamaChatRequest
from m7mlx_serve.ollama.embed import EmbedRequest
from m7mlx_serve.ollama.fields import error_body

_Fields = dict[str, Any]
_SECOND = 1_000_000_000  # nanoseconds


class OllamaAnswers:
    """The answer to one request, of either endpoint."""

    stream_type: ClassVar[str] = "application/x-ndjson"

    def __init__(self, answerer: Answerer, read: ReadRequest) -> None:
        self._answerer, self._read, self._began = answerer, read, time.perf_counter()
        self._is_chat = isinstance(read.body, OllamaChatRequest)
        self._reader = AnswerReader(answerer.tokenizer, read.prompts.tool_use)
        self._stats = Stats()

    async def whole(self) -> Iterator[str]:
        """The JSON of the answer."""
        if not self._read.prompts.ids:
            return iter([json.dumps(self._loaded())])
        texts, thoughts = list[str](), list[str]()
        async with aclosing(self._answerer.answers(self._read)) as pieces:
            async for _, piece in pieces:
                text, thought = self._told(piece)
                texts.append(text)
                thoughts.append(thought)
        line = self._line("".join(texts), self._calls(), "".join(thoughts))
        return iter([json.dumps(line | self._end(), ensure_ascii=False)])

    async def stream(self) -> AsyncGenerator[str, None]:
        """A line for each piece of text, one for all calls, and one that says how it ended."""
        if not self._read.prompts.ids:
            yield _write(self._loaded())
            return
        begun = False
        try:
            async with aclosing(self._answerer.answers(self._read)) as pieces:
                async for _, piece in pieces:
                    begun = True
                    text, thought = self._told(piece)
                    if text or thought:
                        yield _write(self._line(text, thought=thought) | {"done": False})
        except ApiError as error:
            if not begun:
                raise
            yield _write(error_body(error))
            return
        if calls := self._calls():
            yield _write(self._line("", calls) | {"done": False})
        yield _write(self._line("") | self._end())

    def _told(self, piece: Piece) -> tuple[str, str]:
        self._stats = piece.stats or self._stats
        told = self._reader.read(piece)
        return told.text, told.thought

    def _calls(self) -> list[_Fields]:
        functions = [call["function"] for call in self._reader.calls]
        return [
            {"function": {"name": function["name"], "arguments": read_arguments(function["arguments"])}}
            for function in functions
        ]

    def _line(self, text: str, calls: Sequence[_Fields] = (), thought: str = "") -> _Fields:
        line: _Fields = {"model": self._answerer.model, "created_at": now()}
        thinking = {"thinking": thought} if thought else {}
        if not self._is_chat:
            return line | {"response": text, **thinking}
        called = {"tool_calls": list(calls)} if calls else {}
        return line | {"message": {"role": "assistant", "content": text, **thinking, **called}}

    def _loaded(self) -> _Fields:
        """What is answered to a request without a prompt: by now, the model is loaded."""
        return self._line("") | {"done": True, "done_reason": "load"}

    def _end(self) -> _Fields:
        stats, total = self._stats, time.perf_counter() - self._began
        reading = min(stats.time_to_first_token, total)
        return {
            "done": True,
            "done_reason": "length" if self._reader.reason == "length" else "stop",
            "total_duration": int(total * _SECOND),
            "load_duration": 0,
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_duration": int(reading * _SECOND),
            "eval_count": stats.generated_tokens,
            "eval_duration": int((total - reading) * _SECOND),
        }


class EmbedAnswers(VectorAnswers):
    """The vectors of one request."""

    def __init__(self, answerer: Answerer, read: ReadRequest) -> None:
        assert isinstance(read.body, EmbedRequest)
        super().__init__(answerer, read)
        self._body, self._began = read.body, time.perf_counter()

    async def whole(self) -> Generator[str, None, None]:
        """The JSON of all vectors, in pieces."""
        vectors = await self._answerer.vectors(self._read, dimensions=self._body.dimensions)
        return self._written(vectors)

    def _written(self, vectors: Sequence[bytes]) -> Generator[str, None, None]:
        told = {
            "model": self._answerer.model,
            "total_duration": int((time.perf_counter() - self._began) * _SECOND),
            "load_duration": 0,
            "prompt_eval_count": sum(map(len, self._read.prompts.ids)),
        }
        yield json.dumps(told).removesuffix("}") + ', "embeddings": ['
        for i, vector in enumerate(vectors):
            yield f"{', ' if i else ''}{numbers_in_json(vector)}"
        yield "]}"


class EmbedOneAnswers(VectorAnswers):
    """The vector of one text."""

    async def whole(self) -> Generator[str, None, None]:
        """The JSON of the vector."""
        (vector,) = await self._answerer.vectors(self._read)
        return (piece for piece in [f'{{"embedding": {numbers_in_json(vector)}}}'])


def describe() -> _Fields:
    """The details of a model that clients look for."""
    return {
        "parent_model": "",
        "format": "mlx",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "",
        "quantization_level": "",
    }


def now() -> str:
    """The time, as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _write(line: _Fields) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
