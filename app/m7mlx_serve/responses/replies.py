"""The shapes of what clients of /v1/responses are answered, for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OutputText(_Reply):
    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: Annotated[list[Any], Field(max_length=0)]


class ReasoningText(_Reply):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(_Reply):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class OutputReasoning(_Reply):
    """What the model thought. `encrypted_content` is the same, in Base64."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: Annotated[list[Any], Field(max_length=0)]
    content: list[ReasoningText]
    encrypted_content: str | None = None


class OutputCall(_Reply):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class OutputCustomCall(_Reply):
    id: str
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str


OutputItem = OutputMessage | OutputReasoning | OutputCall | OutputCustomCall


class ResponseUsage(_Reply):
    class Input(_Reply):
        cached_tokens: Count
        cache_write_tokens: Literal[0]

    class Output(_Reply):
        reasoning_tokens: Count

    input_tokens: Count
    input_tokens_details: Input
    output_tokens: Count
    output_tokens_details: Output
    total_tokens: Count


class ResponseReply(_Reply):
    """A response. Instructions, tools and schemas are not told again."""

    class Error(_Reply):
        code: Literal["server_error", "rate_limit_exceeded"]
        message: str

    class Incomplete(_Reply):
        reason: Literal["max_output_tokens"]

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: Error | None
    incomplete_details: Incomplete | None
    instructions: None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, None]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Literal["auto"]
    tools: Annotated[list[Any], Field(max_length=0)]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class DroppedResponse(_Reply):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ResponseEvent(BaseModel):
    """The data of one event, whose name is its type: as in OpenAI's schema of that name."""

    type: str
    sequence_number: Count
