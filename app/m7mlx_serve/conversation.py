"""A conversation to be answered, whatever API it came by: the one request that all of them make."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from m7mlx.errors import InputError
from m7mlx.grammar import schema_text
from m7mlx.tokens.messages import Message, is_continued
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tools.calling import Rules, call_form
from m7mlx_serve.endpoint import Prompts
from m7mlx_serve.strict import MAX_TEXT


@dataclass(frozen=True)
class Conversation:
    """Messages and tools, and what the answer may be.

    messages  as `m7mlx.tokens.messages` has them
    tools     functions that may be called: name, description, parameters (a JSON schema)
    choice    whether one may, or must, be called
    named     the only one that may be called, by name
    parallel  whether several may be called at once
    schema    the JSON schema of an answer that calls none
    effort    how much the model shall think, if it can be told so
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    choice: Literal["auto", "none", "required"] = "auto"
    named: str | None = None
    parallel: bool = True
    schema: Mapping[str, Any] | None = None
    effort: str | None = None

    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """The ids that the model reads, and what its answer follows. Raises InputError."""
        self._check()
        continued, form = is_continued(self.messages), call_form(tokenizer)
        effort = self.effort if tokenizer.chat.takes_effort else None
        told = [{"type": "function", "function": dict(tool)} for tool in self.tools]
        if not told or self.choice == "none":
            ids = form.encode(self.messages, (), False, {"effort": effort, "schema": self.schema})
            if self.schema is not None:
                schema_text(self.schema)
            return Prompts([array("i", ids)], self.schema, "none", not continued)
        is_required = self.choice == "required"
        schema_told = None if is_required else self.schema
        ids = form.encode(self.messages, told, is_required, {"effort": effort, "schema": schema_told})
        functions = [tool for tool in self.tools if self.named in (None, tool["name"])]
        schema = None if continued else form.schema(Rules(functions, is_required, self.parallel, self.schema))
        if isinstance(schema, Mapping):
            schema_text(schema)
        return Prompts([array("i", ids)], schema, "required" if is_required else "allowed", not continued)

    def _check(self) -> None:
        size = sum(map(_size, self.messages))
        if self.tools and size <= MAX_TEXT:
            size += len(json.dumps(list(self.tools)))
        if size > MAX_TEXT:
            raise InputError(f"messages: with tools, {size:,} characters are more than {MAX_TEXT:,}")
        names = [tool["name"] for tool in self.tools]
        if len(set(names)) < len(names):
            raise InputError("tools: two of them have the same name")
        if self.choice == "required" and not names:
            raise InputError("tool_choice: there are no tools to call; give tools, or leave it out")
        if self.named is not None and self.named not in names:
            raise InputError(f"tool_choice: there is no tool of the name {self.named!r}")
        if not self.messages:
            raise InputError("messages: a conversation needs at least one message")
        if is_continued(self.messages):
            if self.choice == "required":
                raise InputError("tool_choice: an answer that must call a tool has no prefix")
            if self.schema is not None:
                raise InputError("response_format: an answer in JSON has no prefix")


def _size(message: Mapping[str, Any]) -> int:
    """The characters of a message."""
    content = message.get("content") or ""
    texts = [
        content,
        message.get("reasoning_content") or "",
        message.get("name") or "",
        message.get("tool_call_id") or "",
    ]
    for call in message.get("tool_calls") or ():
        texts += (call["id"], call["function"]["name"], call["function"]["arguments"])
    return sum(map(len, texts))
