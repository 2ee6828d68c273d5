"""POST /v1/messages: the next message of a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.anthropic.blocks import Message, TextBlock, ToolBlock, ToolChoice
from m7mlx_serve.anthropic.errors import error_body
from m7mlx_serve.anthropic.replies import ErrorMessage, MessageReply, StreamEvent
from m7mlx_serve.conversation import Conversation
from m7mlx_serve.endpoint import Body, Endpoint, Prompts, Wanted
from m7mlx_serve.strict import Finite, Strict, Text

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
# Claude Code begins its system prompt with a line that differs from request to request: nothing of
# the conversation behind it could be used again.
_ATTRIBUTION = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")


class Format(Strict):
    """The JSON schema that the answer must fit."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    ignored = frozenset({"name"})


class OutputConfig(Strict):
    """What the answer is like."""

    format: Format | None = None
    ignored = frozenset({"effort"})


class MessageBody(Body):
    """What both endpoints take: a conversation."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    system: Text | Annotated[list[TextBlock], Field(fail_fast=True)] = ""
    tools: Annotated[list[ToolBlock], Field(max_length=512, fail_fast=True)] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None
    ignored = frozenset(
        {
            *("metadata", "service_tier", "thinking", "context_management", "betas", "cache_control", "speed"),
            *("diagnostics", "user_profile_id", "workspace_id"),
        }
    )
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {"mcp_servers": [[]], "container": [""], "inference_geo": [""]}
    advice: ClassVar[Mapping[str, str]] = {
        "mcp_servers": "the server calls no other; give the model tools that the client runs",
        "container": "nothing runs on the server; leave it out",
    }

    def conversation(self) -> Conversation:
        """What is to be answered. A last message of the assistant's is continued."""
        blocks = [self.system] if isinstance(self.system, str) else [block.text for block in self.system]
        texts = [_ATTRIBUTION.sub("", text) for text in blocks]
        system = "\n\n".join(text for text in texts if text)
        messages = [plain for message in self.messages for plain in message.plain()]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        last = messages[-1]
        if last["role"] == "assistant" and last["content"] and "tool_calls" not in last:
            last["prefix"] = True
        choice = self.tool_choice or ToolChoice(type="auto")
        format = self.output_config.format if self.output_config and self.output_config.format else self.output_format
        return Conversation(
            messages,
            [
                {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
                for tool in self.tools
            ],
            "required" if choice.type in ("any", "tool") else "none" if choice.type == "none" else "auto",
            choice.name if choice.type == "tool" else None,
            not choice.disable_parallel_tool_use,
            format.schema_ if format else None,
        )

    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """The ids of the conversation, and what the answer follows."""
        return self.conversation().prompts(tokenizer)

    def without_texts(self) -> Self:
        """Leave out messages, tools and schemas."""
        nothing: dict[str, Any] = {
            "system": "",
            "tools": [],
            "tool_choice": None,
            "output_config": None,
            "output_format": None,
        }
        return self.model_copy(update={"messages": [Message(role="user", content="")], **nothing})


class MessageRequest(MessageBody):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[Stop], Field(max_length=64, fail_fast=True)] = Field(default_factory=list)
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 30)] | None = None

    def wanted(self) -> Wanted:
        """How the answer is wanted."""
        return Wanted(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
        )


ENDPOINT = Endpoint(
    "/v1/messages",
    "Answer a conversation, by Anthropic's API",
    MessageRequest,
    MessageReply,
    StreamEvent,
    error_body,
    ErrorMessage,
)
