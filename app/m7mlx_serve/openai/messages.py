"""Messages as OpenAI's and Mistral's clients send them, and put answers back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from m7mlx_serve.strict import Name, Strict, Text


class TextPart(Strict):
    """A part of a message. Pictures and sound are refused; nothing is ever fetched."""

    type: Literal["text", "input_text", "output_text"] = "text"
    text: Text
    ignored = frozenset({"annotations", "cache_control", "logprobs"})

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        kind = data.get("type", "text") if isinstance(data, dict) else "text"
        if isinstance(kind, str) and kind not in ("text", "input_text", "output_text"):
            raise ValueError(
                f"a part of type {kind[:50]!r} cannot be read: this model reads text alone; leave it out"
            )
        return data


class CalledFunction(Strict):
    """The name and arguments of a call."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    arguments: Text | dict[str, Any] = "{}"  # Mistral's clients may send an object
    ignored = frozenset({"parsed_arguments"})


class ToolCall(Strict):
    """A call in a message of the assistant."""

    id: Annotated[str, Field(max_length=100)]
    type: Literal["function"] = "function"
    function: CalledFunction
    ignored = frozenset({"index", "provider_specific_fields", "extra_content"})


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    reasoning_content: Text | None = None  # what the model thought before it answered
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=100)] | None = None
    prefix: bool | None = None  # Mistral's: the last message is the beginning of the answer
    # What clients put back of an answer.
    ignored = frozenset(
        {
            *("annotations", "parsed", "reasoning", "reasoning_details"),
            *("provider_specific_fields", "thinking_blocks", "cache_control"),
        }
    )
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {"refusal": [""], "images": [[]], "audio": [{}]}
    advice: ClassVar[Mapping[str, str]] = {"function_call": "this old field is not read; use tool_calls"}

    def plain(self) -> dict[str, Any]:
        """The message as `m7mlx.tokens.messages` takes it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            found["tool_calls"] = [_plain_call(call) for call in self.tool_calls]
        others = ("reasoning_content", "name", "tool_call_id", "prefix")
        return found | {k: v for k in others if (v := getattr(self, k)) is not None}


def _plain_call(call: ToolCall) -> dict[str, Any]:
    arguments = call.function.arguments
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": text}}
