"""Fields that a body has at both endpoints.

A field that would change the answer and is not supported is refused, not ignored; one that only
describes the client (`user`, `metadata`, `store`) is let through.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from m7mlx.errors import InputError
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.endpoint import Body
from m7mlx_serve.openai.shape import Shape
from m7mlx_serve.strict import Finite, Strict

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
MEANINGLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
NEUTRAL = {"presence_penalty": 0, "frequency_penalty": 0}  # other values are not served
_MOST_BIASED = 1024


class StreamOptions(Strict):
    """What a stream tells besides the answer."""

    include_usage: bool = False


class Generation(Body):
    """How to answer, whatever the prompt."""

    model: str
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=64, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[Finite, Field(ge=-100, le=100)]], Field(max_length=_MOST_BIASED)] | None
    ) = None
    ignored: ClassVar[frozenset[str]] = frozenset({*MEANINGLESS, *NEUTRAL})
    shape: ClassVar[Shape]

    def encode(self, tokenizer: Tokenizer) -> array[int]:
        """The ids of the prompt. Raises InputError for what the model cannot do."""
        if self.stream_options and not self.stream:
            raise InputError("stream_options is for streams: set stream")
        return self._encode_prompt(tokenizer)

    @property
    def starts_message(self) -> bool:
        """Whether the answer begins a message, not amid a text."""
        return False

    @property
    def tool_use(self) -> Literal["none", "allowed", "required"]:
        """Whether the answer may, or must, call tools."""
        return "none"

    @property
    def answer_schema(self) -> Mapping[str, Any] | None:
        """The JSON schema that the answer follows, if any."""
        return None

    @property
    def demanded_calls(self) -> Mapping[str, Any] | None:
        """The calls that are demanded (`m7mlx.constrain.calls_constraint`), if any."""
        return None

    @property
    @abstractmethod
    def token_limit(self) -> int | None:
        """The most tokens that the client wants."""

    @property
    @abstractmethod
    def logprob_count(self) -> int | None:
        """How many of the likeliest tokens to tell the log probability of; None for none."""

    @abstractmethod
    def _encode_prompt(self, tokenizer: Tokenizer) -> array[int]: ...

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases_few(cls, data: Any) -> Any:
        """Count the ids before each of them is looked at."""
        if isinstance(data, dict) and len(data) > _MOST_BIASED:
            raise ValueError(f"at most {_MOST_BIASED:,} ids can be biased")
        return data

    @model_validator(mode="before")
    @classmethod
    def _drop_what_means_nothing(cls, data: Any) -> Any:
        """Drop fields that mean nothing here, and what asks for nothing: null, penalties of 0."""
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if value is not None and key not in MEANINGLESS and not (key in NEUTRAL and value == NEUTRAL[key])
        }
