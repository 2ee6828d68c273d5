"""POST /api/chat: the next message of a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.conversation import Conversation
from m7mlx_serve.endpoint import Endpoint, Prompts
from m7mlx_serve.ollama.fields import Generation, error_body
from m7mlx_serve.ollama.replies import ChatLine, OllamaError
from m7mlx_serve.strict import Name, Strict, Text


class CalledFunction(Strict):
    """The name and arguments of a call."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    arguments: dict[str, Any] = Field(default_factory=dict)
    ignored = frozenset({"index", "description"})


class ToolCall(Strict):
    """A call in a message of the assistant."""

    function: CalledFunction
    ignored = frozenset({"id", "type", "index"})


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text = ""
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] = Field(default_factory=list)
    tool_name: Name | None = None
    thinking: Text = ""
    ignored = frozenset({"tool_call_id", "name"})
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {"images": [[]]}
    advice: ClassVar[Mapping[str, str]] = {"images": "this model reads text alone; leave it out"}


class Function(Strict):
    """What the model is told of a function."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: Text = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    ignored = frozenset({"strict"})


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: Function


class OllamaChatRequest(Generation):
    """The body of POST /api/chat.

    system  instructions before all messages, as Open WebUI sends them
    """

    system: Text = ""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=512, fail_fast=True)] = Field(default_factory=list)
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {**Generation.neutral, "suffix": [""]}

    def conversation(self) -> Conversation:
        """What is to be answered. Calls have no ids here: results follow them in their order."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        open_calls: list[str] = []
        for message in self.messages:
            found: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.role == "assistant" and message.thinking:
                found["reasoning_content"] = message.thinking
            if message.tool_calls:
                named = [
                    (f"call{len(messages):03}{n:02}", call.function) for n, call in enumerate(message.tool_calls)
                ]
                open_calls = [id for id, _ in named]
                found["tool_calls"] = [_call(id, function) for id, function in named]
            if message.role == "tool":
                found["tool_call_id"] = open_calls.pop(0) if open_calls else "call00000"
                found |= {"name": message.tool_name} if message.tool_name else {}
            messages.append(found)
        functions = [tool.function.model_dump() for tool in self.tools]
        return Conversation(messages, functions, schema=self.schema_wanted, effort=self.effort)

    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """The ids of the conversation, and what the answer follows."""
        return self.conversation().prompts(tokenizer)

    def without_texts(self) -> Self:
        """Leave out messages, tools and the schema."""
        nothing: dict[str, Any] = {"system": "", "tools": [], "format": ""}
        return self.model_copy(update={"messages": [ChatMessage(role="user")], **nothing})


def _call(id: str, function: CalledFunction) -> dict[str, Any]:
    arguments = json.dumps(function.arguments, ensure_ascii=False)
    return {"id": id, "type": "function", "function": {"name": function.name, "arguments": arguments}}


ENDPOINT = Endpoint(
    "/api/chat",
    "Answer a conversation, by Ollama's API",
    OllamaChatRequest,
    ChatLine,
    ChatLine,
    error_body,
    OllamaError,
)
