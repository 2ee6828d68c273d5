"""POST /v1/completions: a text, or ids, to go on with."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from m7mlx.errors import InputError, TokenizerError
from m7mlx.tokens.infill import infill_ids
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.endpoint import Endpoint
from m7mlx_serve.openai.fields import Generation
from m7mlx_serve.openai.replies import TextChunk, TextCompletion
from m7mlx_serve.openai.shape import Fields, Shape
from m7mlx_serve.strict import MAX_TEXT, Text

_DEFAULT_TOKENS = 16  # OpenAI's
_LARGEST_ID = (1 << 31) - 1  # beyond the ids of any vocabulary


class TextShape(Shape):
    """A choice is a text; log probabilities are lists side by side."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def opening(self) -> Fields | None:
        """Nothing: the first chunk has the first text."""
        return None

    def delta(self, text: str = "", thought: str = "", call: Fields | None = None) -> Fields:
        """More text. A text that is gone on with has no other place for thoughts."""
        return {"text": thought + text}

    def whole(self, text: str, calls: Sequence[Fields], thought: str) -> Fields:
        """The whole text."""
        return {"text": thought + text}

    def logprobs(self, scored: Sequence[Fields], offset: int) -> dict[str, list[Any]]:
        """One list for each field of a token."""
        return {
            "tokens": [token["token"] for token in scored],
            "token_logprobs": [token["logprob"] for token in scored],
            "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in scored],
            "text_offset": [offset] * len(scored),
        }


class CompletionRequest(Generation):
    """The body of POST /v1/completions."""

    prompt: Text | Annotated[list[int], Field(min_length=1, max_length=MAX_TEXT, fail_fast=True)]
    suffix: Text | None = None  # what stands behind the answer, for models that fill in the middle
    echo: Literal[False] = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    shape: ClassVar[Shape] = TextShape()

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the client wants."""
        return self.max_tokens or _DEFAULT_TOKENS

    @property
    def logprob_count(self) -> int | None:
        """How many of the likeliest tokens to tell the log probability of; None for none."""
        return self.logprobs

    def without_texts(self) -> Self:
        """Leave out the prompt, and what stands behind the answer."""
        return self.model_copy(update={"prompt": "", "suffix": None})

    def _encode_prompt(self, tokenizer: Tokenizer) -> array[int]:
        if self.suffix and not isinstance(self.prompt, str):
            raise InputError("a suffix goes with a prompt that is a text, not ids")
        if self.suffix and isinstance(self.prompt, str):
            return array("i", infill_ids(tokenizer, self.prompt, self.suffix))
        if isinstance(self.prompt, str):
            return array("i", tokenizer.encode(self.prompt, add_bos=tokenizer.add_bos))
        if beyond := next((token for token in self.prompt if not 0 <= token <= _LARGEST_ID), None):
            raise TokenizerError(f"token id {beyond} is outside the model's vocabulary")
        return array("i", self.prompt)


ENDPOINT = Endpoint("/v1/completions", "Go on from a text or from ids", CompletionRequest, TextCompletion, TextChunk)
