"""POST /v1/completions: texts, or ids, to go on with."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from m7mlx.errors import InputError
from m7mlx.tokens.infill import infill_ids
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.endpoint import Endpoint, Prompts
from m7mlx_serve.errors import ApiError
from m7mlx_serve.openai.fields import NEUTRAL, Generation
from m7mlx_serve.openai.inputs import Inputs, encode_inputs
from m7mlx_serve.openai.replies import ErrorReply, TextChunk, TextCompletion
from m7mlx_serve.openai.shape import Fields, Scored, Shape
from m7mlx_serve.strict import Text

_DEFAULT_TOKENS = 16  # OpenAI's


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

    def logprobs(self, scored: Sequence[Scored]) -> dict[str, list[Any]]:
        """One list for each field of a token; the first of a prompt has no log probability."""
        tokens = [token for token, _ in scored]
        return {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [
                None if token["logprob"] is None else {top["token"]: top["logprob"] for top in token["top_logprobs"]}
                for token in tokens
            ],
            "text_offset": [offset for _, offset in scored],
        }


class CompletionRequest(Generation):
    """The body of POST /v1/completions."""

    prompt: Inputs
    suffix: Text | None = None  # what stands behind the answer, for models that fill in the middle
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {**NEUTRAL, "best_of": [1]}
    shape: ClassVar[Shape] = TextShape()

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the client wants."""
        return _DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """How many of the likeliest tokens to tell the log probability of; None for none."""
        return self.logprobs

    @property
    def prompt_logprob_count(self) -> int | None:
        """The same for the prompt; where no token is wanted, nothing else is to be done."""
        wanted = self.logprobs if self.echo else None
        return 0 if wanted is None and self.max_tokens == 0 else wanted

    @property
    def echoes(self) -> bool:
        """Whether each answer is told behind its prompt."""
        return self.echo

    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """The ids of all prompts."""
        if self.suffix:
            if not isinstance(self.prompt, str):
                raise InputError("a suffix goes with a prompt that is a text, not ids or a list")
            return Prompts([array("i", infill_ids(tokenizer, self.prompt, self.suffix))])
        return Prompts(encode_inputs(tokenizer, self.prompt, "prompt"))

    def without_texts(self) -> Self:
        """Leave out the prompt, and what stands behind the answer."""
        return self.model_copy(update={"prompt": "", "suffix": None})


ENDPOINT = Endpoint(
    "/v1/completions",
    "Go on from texts or from ids",
    CompletionRequest,
    TextCompletion,
    TextChunk,
    ApiError.body,
    ErrorReply,
)
