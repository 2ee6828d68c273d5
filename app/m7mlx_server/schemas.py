"""What clients send and get: the part of OpenAI's API that a local model has an answer to.

Fields that would change the answer and are not supported are refused, not ignored; those that only describe the
client (`user`, `metadata`, `store`) are let through.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=4_000_000)]
_MEANINGLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A part of a message; pictures and sound are refused, and nothing is ever fetched."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, Any]:
        """As `m7mlx.chat` takes it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    include_usage: bool = False


class Generation(_Strict):
    """What both ways of asking have in common."""

    model: str
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_means_nothing(cls, data: Any) -> Any:
        """… here, and what asks for nothing: null, and penalties of 0."""
        if not isinstance(data, dict):
            return data
        neutral = {"presence_penalty": 0, "frequency_penalty": 0, "logprobs": False, "tools": [], "logit_bias": {}}
        return {
            key: value
            for key, value in data.items()
            if value is not None and key not in _MEANINGLESS and not (key in neutral and value == neutral[key])
        }


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(Generation):
    """POST /v1/completions: a text or ids to go on from."""

    prompt: Text | Annotated[list[int], Field(min_length=1)]
    echo: Literal[False] = False
