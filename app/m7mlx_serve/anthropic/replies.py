"""The shapes of what Anthropic's clients are answered, for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

Count = Annotated[int, Field(ge=0)]
Reason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MessageUsage(_Reply):
    """Tokens read anew and tokens held already: 0 without keys, and while an answer comes."""

    input_tokens: Count
    output_tokens: Count
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: Count


class TextContent(_Reply):
    type: Literal["text"]
    text: str


class ThinkingContent(_Reply):
    type: Literal["thinking"]
    thinking: str
    signature: Literal[""]


class ToolUseContent(_Reply):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageReply(_Reply):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextContent | ThinkingContent | ToolUseContent]
    stop_reason: Reason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(_Reply):
    input_tokens: Count


class MessageStart(_Reply):
    type: Literal["message_start"]
    message: MessageReply


class BlockStart(_Reply):
    type: Literal["content_block_start"]
    index: Count
    content_block: TextContent | ThinkingContent | ToolUseContent


class TextDelta(_Reply):
    type: Literal["text_delta"]
    text: str


class ThinkingDelta(_Reply):
    type: Literal["thinking_delta"]
    thinking: str


class InputDelta(_Reply):
    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(_Reply):
    type: Literal["content_block_delta"]
    index: Count
    delta: TextDelta | ThinkingDelta | InputDelta


class BlockStop(_Reply):
    type: Literal["content_block_stop"]
    index: Count


class MessageDelta(_Reply):
    class Delta(_Reply):
        stop_reason: Reason
        stop_sequence: str | None

    type: Literal["message_delta"]
    delta: Delta
    usage: MessageUsage


class MessageStop(_Reply):
    type: Literal["message_stop"]


class StreamEvent(RootModel[MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop]):
    """The data of one event, whose name is its type."""


class ErrorMessage(_Reply):
    """Every refusal and failure; in a stream that has begun, the data of its last event."""

    class Error(_Reply):
        type: str
        message: str

    type: Literal["error"]
    error: Error
