"""The items that conversations consist of, as clients of /v1/responses send them."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from m7mlx_serve.strict import MAX_TEXT, Name, Strict, Text

CallId = Annotated[str, Field(max_length=100)]
_STATUS = frozenset({"id", "status", "caller", "async", "created_by", "agent", "phase"})
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
# Calls that OpenAI's own servers have run: what they gave is in the answer that follows.
_HOSTED = ("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call", "mcp_list_tools")


class Part(Strict):
    """A part of a message, or of what a call gave: text."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: Text
    ignored = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if kind == "refusal" and isinstance(data.get("refusal"), str):
            return {"type": "output_text", "text": data["refusal"]}
        if isinstance(kind, str) and kind not in _TEXTS:
            raise ValueError(f"a part of type {kind[:50]!r} cannot be read: this model reads text; leave it out")
        return data


Parts = Annotated[list[Part], Field(max_length=10_000, fail_fast=True)]


class MessageItem(Strict):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Parts
    ignored = _STATUS


class CallItem(Strict):
    """A call of a function, perhaps of a namespace."""

    type: Literal["function_call"]
    call_id: CallId
    name: Annotated[str, Field(min_length=1, max_length=200)]
    namespace: Name = ""
    arguments: Text = "{}"
    ignored = _STATUS | {"parsed_arguments"}


class CustomCallItem(Strict):
    """A call of a tool that takes a text."""

    type: Literal["custom_tool_call"]
    call_id: CallId
    name: Annotated[str, Field(min_length=1, max_length=200)]
    input: Text = ""
    ignored = _STATUS | {"namespace"}


class ResultItem(Strict):
    """What a call gave."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: CallId
    output: Text | Parts
    ignored = _STATUS | {"name"}


class ReasoningItem(Strict):
    """What the model thought. What is called encrypted is the thought, in Base64 (`sealed`)."""

    type: Literal["reasoning"]
    summary: Parts = Field(default_factory=list)
    content: Parts = Field(default_factory=list)
    encrypted_content: Text = ""
    ignored = _STATUS

    @property
    def thought(self) -> str:
        """The thought; "" if another server has sealed it."""
        return "".join(part.text for part in self.content) or opened(self.encrypted_content)


class HostedItem(Strict):
    """A call that another server has run. It is left out."""

    type: Name

    @model_validator(mode="before")
    @classmethod
    def _says_nothing(cls, data: Any) -> Any:
        return {"type": data["type"]} if isinstance(data, dict) else data


_TAGS = {
    "message": "Message",
    "function_call": "Call",
    "custom_tool_call": "CustomCall",
    "function_call_output": "Result",
    "custom_tool_call_output": "Result",
    "reasoning": "Reasoning",
    **dict.fromkeys(_HOSTED, "Hosted"),
}


def _tag(item: Any) -> str:
    """Which shape an item has; "Message" for one whose type is not known, which that refuses."""
    kind = item.get("type") or "message" if isinstance(item, dict) else getattr(item, "type", "message")
    return _TAGS.get(kind, "Message") if isinstance(kind, str) else "Message"


Item = Annotated[
    Annotated[MessageItem, Tag("Message")]
    | Annotated[CallItem, Tag("Call")]
    | Annotated[CustomCallItem, Tag("CustomCall")]
    | Annotated[ResultItem, Tag("Result")]
    | Annotated[ReasoningItem, Tag("Reasoning")]
    | Annotated[HostedItem, Tag("Hosted")],
    Discriminator(_tag),
]


def check_kind(item: Any) -> None:
    """Raise ValueError for an item of a type that cannot be read."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "item_reference":
        raise ValueError("an item_reference cannot be followed: send the item itself, or previous_response_id")
    if isinstance(kind, str) and kind not in _TAGS:
        raise ValueError(f"an item of type {kind[:50]!r} cannot be read; leave it out")


def plain(items: Sequence[Any]) -> list[dict[str, Any]]:
    """The items as messages (`m7mlx.tokens.messages`).

    What the assistant thought, said and called in one turn is one message there.
    """
    messages: list[dict[str, Any]] = []
    thought = ""
    for item in items:
        if isinstance(item, ReasoningItem):
            thought += item.thought
        elif isinstance(item, ResultItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": text_of(item.content)})
        elif not isinstance(item, HostedItem):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            turn = messages[-1]
            if thought:
                turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
                thought = ""
            if isinstance(item, MessageItem):
                turn["content"] = "\n\n".join(text for text in (turn["content"], text_of(item.content)) if text)
            else:
                turn["tool_calls"] = [*turn.get("tool_calls", ()), _call(item)]
    return messages


def text_of(content: str | Sequence[Part]) -> str:
    """The text of a content in either form."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def full_name(namespace: str, name: str) -> str:
    """The name by which a model knows a function of a namespace."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def _call(item: CallItem | CustomCallItem) -> dict[str, Any]:
    if isinstance(item, CallItem):
        name, given = full_name(item.namespace, item.name), item.arguments
    else:
        name, given = item.name, json.dumps({"input": item.input}, ensure_ascii=False)
    return {"id": item.call_id, "type": "function", "function": {"name": name, "arguments": given}}


def sealed(thought: str) -> str:
    """A thought in a form that clients put back without looking at it."""
    return base64.b64encode(thought.encode()).decode()


def opened(text: str) -> str:
    """The thought that was sealed; "" for anything else."""
    try:
        return base64.b64decode(text, validate=True).decode()[:MAX_TEXT]
    except (binascii.Error, ValueError):
        return ""


def custom_input(arguments: Mapping[str, Any]) -> str:
    """The text that a tool which takes one is called with."""
    given = arguments.get("input")
    return given if isinstance(given, str) else json.dumps(arguments, ensure_ascii=False)
