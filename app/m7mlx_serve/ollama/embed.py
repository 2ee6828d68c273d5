"""POST /api/embed: texts as vectors; /api/embeddings: one text, as older clients ask."""

from __future__ import annotations

from array import array
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from m7mlx.errors import InputError
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.endpoint import Body, Endpoint, Prompts, Wanted
from m7mlx_serve.ollama.fields import error_body
from m7mlx_serve.ollama.replies import OllamaError, OneVector, Vectors
from m7mlx_serve.strict import MAX_TEXT, Text


class _Embedding(Body):
    """What both have in common: nothing is answered or streamed."""

    stream: Literal[False] = False
    ignored = frozenset({"keep_alive", "options", "truncate"})

    def wanted(self) -> Wanted:
        """Nothing is answered."""
        return Wanted()


class EmbedRequest(_Embedding):
    """The body of POST /api/embed. A text that is too long is refused, not cut."""

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
    dimensions: Annotated[int, Field(ge=1)] | None = None

    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """The ids of all texts."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if sum(map(len, texts)) > MAX_TEXT:
            raise InputError(f"input: all together are longer than {MAX_TEXT:,}; send fewer at a time")
        return Prompts([array("i", tokenizer.encode(text, tokenizer.add_bos)) for text in texts])

    def without_texts(self) -> Self:
        """Leave out the texts."""
        nothing: dict[str, Any] = {"input": ""}
        return self.model_copy(update=nothing)


class EmbedOneRequest(_Embedding):
    """The body of POST /api/embeddings."""

    prompt: Text

    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """The ids of the text."""
        return Prompts([array("i", tokenizer.encode(self.prompt, tokenizer.add_bos))])

    def without_texts(self) -> Self:
        """Leave out the text."""
        return self.model_copy(update={"prompt": ""})


ENDPOINT = Endpoint(
    "/api/embed", "Make vectors of texts, by Ollama's API", EmbedRequest, Vectors, Vectors, error_body, OllamaError
)
ONE_ENDPOINT = Endpoint(
    "/api/embeddings",
    "Make a vector of a text, by Ollama's API",
    EmbedOneRequest,
    OneVector,
    OneVector,
    error_body,
    OllamaError,
)
