"""POST /v1/responses: the next turn of a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, field_validator

from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.conversation import Conversation
from m7mlx_serve.endpoint import Body, Endpoint, Prompts, Wanted
from m7mlx_serve.errors import ApiError
from m7mlx_serve.openai.replies import ErrorReply
from m7mlx_serve.responses.items import Item, MessageItem, check_kind, plain
from m7mlx_serve.responses.replies import ResponseEvent, ResponseReply
from m7mlx_serve.responses.tools import (
    AllowedTools,
    Called,
    Choice,
    NamedTool,
    Tool,
    called_names,
    names_only,
    told_tools,
    without_hosted,
)
from m7mlx_serve.strict import Finite, Name, Strict, Text

_ENCRYPTED = "reasoning.encrypted_content"


class AnswerFormat(Strict):
    """Text, any JSON object, or JSON that fits a schema. It is enforced, not merely asked for."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name = ""
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    ignored = frozenset({"strict", "description"})

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The schema of the answer, if it has to be JSON."""
        return None if self.type == "text" else self.schema_ or {"type": "object"}


class TextOptions(Strict):
    """What the answer's text is like."""

    format: AnswerFormat | None = None
    ignored = frozenset({"verbosity"})


class Reasoning(Strict):
    """How much to think, for models that are told so."""

    effort: Name | None = None
    ignored = frozenset({"summary", "generate_summary", "context", "mode"})


class ResponseRequest(Body):
    """The body of POST /v1/responses."""

    input: Text | Annotated[list[Item], Field(max_length=10_000, fail_fast=True)]
    instructions: Text = ""
    previous_response_id: Name | None = None
    store: bool = True
    tools: Annotated[list[Tool], Field(max_length=512, fail_fast=True)] = Field(default_factory=list)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[Name], Field(max_length=64, fail_fast=True)] = Field(default_factory=list)
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    metadata: Annotated[dict[Name, Annotated[str, Field(max_length=512)]], Field(max_length=16)] = Field(
        default_factory=dict
    )
    ignored = frozenset(
        {
            *("user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
            *("prompt_cache_options", "client_metadata", "max_tool_calls", "stream_options"),
        }
    )
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        "background": [False],
        "truncation": ["disabled"],
        "top_logprobs": [0],
        "conversation": [""],
        "context_management": [[]],
    }
    advice: ClassVar[Mapping[str, str]] = {
        "background": "answers come at once; leave it out",
        "conversation": "conversations are not kept; use previous_response_id",
        "prompt": "prompts are not kept; send instructions and input",
        "truncation": "nothing is left out of a conversation; shorten it, and leave this out",
        "top_logprobs": "log probabilities are told by /v1/chat/completions",
        "max_tokens": "its name is max_output_tokens here",
        "messages": "its name is input here",
        "response_format": "its place is text.format here",
        "reasoning_effort": "its place is reasoning.effort here",
    }
    _earlier: list[dict[str, Any]] = PrivateAttr(default_factory=list)  # messages that came before

    @field_validator("input", mode="before")
    @classmethod
    def _has_known_items(cls, data: Any) -> Any:
        for item in data if isinstance(data, list) else ():
            check_kind(item)
        return data

    @field_validator("tools", mode="before")
    @classmethod
    def _has_no_hosted_tools(cls, data: Any) -> Any:
        return without_hosted(data)

    @field_validator("include")
    @classmethod
    def _includes_what_there_is(cls, names: list[str]) -> list[str]:
        if "message.output_text.logprobs" in names:
            raise ValueError("message.output_text.logprobs are told by /v1/chat/completions; leave it out")
        return [_ENCRYPTED] if _ENCRYPTED in names else []

    @property
    def seals_thoughts(self) -> bool:
        """Whether thoughts are told in a form to be put back, too."""
        return _ENCRYPTED in self.include

    @property
    def called(self) -> Mapping[str, Called]:
        """How the client knows what the model calls, where that differs."""
        return called_names(self.tools)

    def following(self, held: Mapping[str, bytes]) -> Self:
        """The body behind the conversation that it goes on from, one of those `held`, by id."""
        if self.previous_response_id is None:
            return self
        if self.previous_response_id not in held:
            reason = "is not held here, or not any longer; send the whole conversation as input"
            raise ApiError(404, f"previous_response_id: {self.previous_response_id[:100]!r} {reason}")
        found = self.model_copy()
        found._earlier = json.loads(held[self.previous_response_id])
        return found

    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation, without the instructions: these hold for one answer."""
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [*self._earlier, *plain(items)]

    def conversation(self) -> Conversation:
        """What is to be answered."""
        choice, tools = self.tool_choice or "auto", self.tools
        if isinstance(choice, AllowedTools):
            names = {tool.name for tool in choice.tools}
            choice, tools = choice.mode, [tool for tool in tools if tool.name in names]
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        format = self.text.format if self.text else None
        return Conversation(
            [*system, *self.messages()],
            told_tools(tools),
            "required" if isinstance(choice, NamedTool) else choice,
            choice.name if isinstance(choice, NamedTool) else None,
            self.parallel_tool_calls,
            format.wanted if format else None,
            self.reasoning.effort if self.reasoning else None,
        )

    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """The ids of the conversation, and what the answer follows."""
        held = json.dumps(self.messages(), ensure_ascii=False).encode() if self.store else b""
        return replace(self.conversation().prompts(tokenizer), held=held)

    def wanted(self) -> Wanted:
        """How the answer is wanted."""
        return Wanted(
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
        )

    def without_texts(self) -> Self:
        """Leave out items, schemas, and of tools all but names that calls are told by."""
        nothing: dict[str, Any] = {
            "input": "",
            "instructions": "",
            "tools": names_only(self.tools),
            "tool_choice": None,
            "text": None,
        }
        return self.model_copy(update=nothing)


ENDPOINT = Endpoint(
    "/v1/responses",
    "Answer a conversation, by OpenAI's API of responses",
    ResponseRequest,
    ResponseReply,
    ResponseEvent,
    ApiError.body,
    ErrorReply,
)
