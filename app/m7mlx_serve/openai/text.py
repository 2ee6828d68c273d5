"""POST /v1/completions: a text, or ids, to go on with."""

from __future__ import annotations

from array import array
from typing import Annotated, Literal, Self

from pydantic import Field

from m7mlx.errors import TokenizerError
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.endpoint import Endpoint
from m7mlx_serve.openai.fields import Generation
from m7mlx_serve.openai.replies import TextChunk, TextCompletion
from m7mlx_serve.strict import MAX_TEXT, Text

_LARGEST_ID = (1 << 31) - 1  # beyond the ids of any vocabulary


class CompletionRequest(Generation):
    """The body of POST /v1/completions."""

    prompt: Text | Annotated[list[int], Field(min_length=1, max_length=MAX_TEXT, fail_fast=True)]
    echo: Literal[False] = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def without_texts(self) -> Self:
        """Leave out the prompt."""
        return self.model_copy(update={"prompt": ""})

    def _encode_prompt(self, tokenizer: Tokenizer) -> array[int]:
        if isinstance(self.prompt, str):
            return array("i", tokenizer.encode(self.prompt, add_bos=tokenizer.add_bos))
        if beyond := next((token for token in self.prompt if not 0 <= token <= _LARGEST_ID), None):
            raise TokenizerError(f"token id {beyond} is outside the model's vocabulary")
        return array("i", self.prompt)


ENDPOINT = Endpoint("/v1/completions", "Go on from a text or from ids", CompletionRequest, TextCompletion, TextChunk)
