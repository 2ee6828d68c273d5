"""The shapes of what clients are answered, for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Reason = Literal["stop", "length", "tool_calls"]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Cached(_Reply):
    """0 without keys: it does not tell how other clients' conversations begin."""

    cached_tokens: Count


class Predicted(_Reply):
    """Tokens of the prediction that were tried: those in the answer, and those that were wrong.

    Those that were wrong are counted nowhere else.
    """

    accepted_prediction_tokens: Count
    rejected_prediction_tokens: Count


class UsageReply(_Reply):
    """The prompt is counted once, however many answers it gets."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: Cached
    completion_tokens_details: Predicted | None = None  # where there was a prediction


class ScoredToken(_Reply):
    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class Scored(ScoredToken):
    top_logprobs: list[ScoredToken]


class ChatScores(_Reply):
    content: list[Scored]
    refusal: None


class TextScores(_Reply):
    tokens: list[str]
    token_logprobs: list[float | None]  # the first of a prompt has none
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CallReply(_Reply):
    class Function(_Reply):
        name: str
        arguments: str

    id: Annotated[str, Field(pattern="^[A-Za-z0-9]{9}$")]
    type: Literal["function"]
    function: Function


class ChatChoice(_Reply):
    class Message(_Reply):
        role: Literal["assistant"]
        content: str | None
        reasoning_content: str | None = None
        refusal: None
        tool_calls: list[CallReply] = Field(default_factory=list)

    index: Count
    message: Message
    logprobs: ChatScores | None
    finish_reason: Reason


class TextChoice(_Reply):
    index: Count
    text: str
    logprobs: TextScores | None
    finish_reason: Reason


class _Envelope(_Reply):
    id: str
    created: int
    model: str
    usage: UsageReply


class ChatCompletion(_Envelope):
    object: Literal["chat.completion"]
    choices: Annotated[list[ChatChoice], Field(min_length=1)]


class TextCompletion(_Envelope):
    object: Literal["text_completion"]
    choices: Annotated[list[TextChoice], Field(min_length=1)]


class CallDelta(_Reply):
    class Function(_Reply):
        name: str | None = None
        arguments: str

    index: Count
    id: str | None = None
    type: Literal["function"] | None = None
    function: Function


class ChatDelta(_Reply):
    class Delta(_Reply):
        role: Literal["assistant"] | None = None
        content: str | None = None
        reasoning_content: str | None = None
        tool_calls: list[CallDelta] | None = None

    index: Count
    delta: Delta
    logprobs: ChatScores | None
    finish_reason: Reason | None


class TextDelta(_Reply):
    index: Count
    text: str
    logprobs: TextScores | None
    finish_reason: Reason | None


class ChatChunk(_Reply):
    """One event of a stream. With `include_usage`, the last chunk has no choices."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion.chunk"]
    choices: list[ChatDelta]
    usage: UsageReply | None = None


class TextChunk(_Reply):
    id: str
    created: int
    model: str
    object: Literal["text_completion"]
    choices: list[TextDelta]
    usage: UsageReply | None = None


class EmbeddingList(_Reply):
    """A vector for each text: numbers, or their bytes as float32 in Base64."""

    class Embedding(_Reply):
        object: Literal["embedding"]
        index: Count
        embedding: list[float] | str

    class Usage(_Reply):
        prompt_tokens: Count
        total_tokens: Count

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class ModelCard(_Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["m7mlx"]
    type: Literal["base"]
    capabilities: dict[str, bool]
    max_context_length: Count
    loaded: bool


class ModelList(_Reply):
    object: Literal["list"]
    data: list[ModelCard]


class Health(_Reply):
    status: Literal["ok", "stopping"]


class ErrorReply(_Reply):
    """Every refusal and failure; in a stream that has begun, the data of its last event."""

    class Error(_Reply):
        message: str
        type: Literal["invalid_request_error", "server_error"]
        param: str | None
        code: str | None

    error: Error
