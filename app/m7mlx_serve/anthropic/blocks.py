"""The blocks that messages consist of, as Anthropic's clients send them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from m7mlx_serve.strict import Name, Strict, Text

_READ = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


class TextBlock(Strict):
    """Text."""

    type: Literal["text"] = "text"
    text: Text
    ignored = frozenset({"cache_control", "citations"})


class ToolUseBlock(Strict):
    """A call in a message of the assistant."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(max_length=100)]
    name: Annotated[str, Field(min_length=1, max_length=200)]
    input: dict[str, Any] = Field(default_factory=dict)
    ignored = frozenset({"cache_control", "caller"})


class ToolResultBlock(Strict):
    """What a call gave, in a message of the user."""

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(max_length=100)]
    content: Text | Annotated[list[TextBlock], Field(fail_fast=True)] = ""
    ignored = frozenset({"cache_control", "is_error"})


class ThinkingBlock(Strict):
    """What the assistant thought."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: Text = ""
    ignored = frozenset({"signature", "data", "cache_control"})


Block = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock
Blocks = Annotated[list[Annotated[Block, Field(discriminator="type")]], Field(fail_fast=True)]


class Message(Strict):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Text | Blocks

    @model_validator(mode="before")
    @classmethod
    def _reads_text(cls, data: Any) -> Any:
        content = data.get("content") if isinstance(data, dict) else None
        for block in content if isinstance(content, list) else ():
            kind = block.get("type") if isinstance(block, dict) else None
            if isinstance(kind, str) and kind not in _READ:
                raise ValueError(f"a block of type {kind[:50]!r} cannot be read: this model reads text; leave it out")
        return data

    def plain(self) -> list[dict[str, Any]]:
        """The message as `m7mlx.tokens.messages` takes it: results of tools are messages there."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": text_of(block.content)}
            for block in self.content
            if isinstance(block, ToolResultBlock)
        ]
        text = text_of([block for block in self.content if isinstance(block, TextBlock)])
        calls = [_call(block) for block in self.content if isinstance(block, ToolUseBlock)]
        if results and not (text or calls):
            return results
        plain: dict[str, Any] = {"role": self.role, "content": text}
        if thought := "".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock)):
            plain["reasoning_content"] = thought
        return [*results, plain | ({"tool_calls": calls} if calls else {})]


def text_of(content: str | Sequence[TextBlock]) -> str:
    """The text of a content in either form."""
    return content if isinstance(content, str) else "\n\n".join(block.text for block in content)


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


class ToolBlock(Strict):
    """A tool that the model may call; the client runs it."""

    type: Literal["custom"] = "custom"
    name: Name
    description: Text = ""
    input_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    ignored = frozenset(
        {
            *("cache_control", "strict", "eager_input_streaming", "defer_loading", "allowed_callers"),
            "input_examples",
        }
    )

    @model_validator(mode="before")
    @classmethod
    def _runs_at_the_client(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise ValueError(f"a tool of type {kind[:50]!r} would run on the server, which runs none; leave it out")
        return data


class ToolChoice(Strict):
    """Whether tools may, or must, be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False
