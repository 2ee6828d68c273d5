"""Conversations: what a message is, and what turns messages into ids.

A message is a mapping, as everywhere:

    {"role": "system" | "user" | "assistant" | "tool", "content": "text"}

An assistant message may hold `tool_calls` and a tool message `tool_call_id` and `name`, as in
OpenAI's API. An assistant message may hold `ids`: the ids it was generated as, without the end
token. They are used as they are, since the same text can be tokenised in other ways, which the
cache would not recognise. It may hold `reasoning_content`, what the model thought before it
answered; a format that has no place for thoughts leaves it out.

The content of a system prompt or an assistant's message may be a list of parts,
{"type": "text", "text": …} and {"type": "thinking", "thinking": "text"}, as in Mistral's API.

The last message may be an assistant's with `"prefix": True`, as in Mistral's API: the beginning of
the answer, which the model continues.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from m7mlx.errors import ChatFormatError

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")
MAX_DEPTH = 64  # of lists and objects in what tools are given and give back
_NESTED = (dict, list, tuple)


class ChatFormat(ABC):
    """The form in which one model reads conversations."""

    @abstractmethod
    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        effort: str | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of a conversation, up to where the model's answer begins or goes on.

        tools   functions that the model may call, as in OpenAI's API
        effort  how much the model shall think, for models that are told so ("high"); None takes
                the model's default
        schema  the JSON schema that the answer will follow, for models that are told so

        Raises ChatFormatError.
        """

    @property
    def takes_effort(self) -> bool:
        """Whether the model can be told how much to think."""
        return False


def is_continued(messages: Sequence[Message]) -> bool:
    """Whether the model continues the last message, instead of answering it."""
    return bool(messages[-1].get("prefix"))


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ChatFormatError unless these are messages with known roles and text."""
    if not messages:
        raise ChatFormatError("a conversation needs at least one message")
    for n, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ChatFormatError(f"message {n} has no role out of {', '.join(ROLES)}")
        name = f"message {n} ({message['role']})"
        content = message.get("content")
        if isinstance(content, list) and message["role"] in ("system", "assistant"):
            _check_parts(content, name)
        elif not isinstance(content, str) and not message.get("tool_calls") and not _is_thought(message):
            raise ChatFormatError(f"{name} has no text as its content")
        if not isinstance(message.get("reasoning_content"), str | None):
            raise ChatFormatError(f"{name}: reasoning_content must be a text")
        if message.get("prefix") is not None:
            _check_prefix(message, name, is_last=n == len(messages))


def _is_thought(message: Message) -> bool:
    """Whether an answer was broken off while the model was thinking."""
    return message["role"] == "assistant" and bool(message.get("reasoning_content"))


def _check_parts(parts: Sequence[Any], name: str) -> None:
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "thinking") or not isinstance(part.get(kind), str):
            raise ChatFormatError(f"{name}: a part of its content is neither text nor thinking")


def _check_prefix(message: Message, name: str, *, is_last: bool) -> None:
    if not isinstance(message["prefix"], bool):
        raise ChatFormatError(f"{name}: prefix must be true or false")
    if not message["prefix"]:
        return
    if not is_last or message["role"] != "assistant":
        raise ChatFormatError(f"{name} cannot have a prefix of true: only an assistant's last message is continued")
    if message.get("tool_calls"):
        raise ChatFormatError(f"{name} calls tools, so it cannot be continued; leave out prefix")
    if not (message.get("content") or message.get("ids") or _is_thought(message)):
        raise ChatFormatError(f"{name} is empty, so it cannot be continued; leave it out")


def nests_deeper(value: Any, levels: int) -> bool:
    """Whether lists and mappings nest deeper than so many levels. Does not recurse itself."""
    level = [value] if isinstance(value, _NESTED) else []
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, _NESTED)
        ]
    return bool(level)


def parse_json(value: Any) -> Any:
    """Return the value of a text that is JSON, and any other text as it is.

    Raises ChatFormatError where it nests too deep.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if not nests_deeper(value, MAX_DEPTH):
            return value
    except ValueError:
        return value
    except RecursionError:
        pass
    raise ChatFormatError(f"a tool's arguments or its answer nest deeper than {MAX_DEPTH} levels")
