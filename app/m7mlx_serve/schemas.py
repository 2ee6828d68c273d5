"""What clients send and get: the part of OpenAI's API that a local model has an answer to.

Fields that would change the answer and are not supported are refused, not ignored; those that only describe the
client (`user`, `metadata`, `store`) are let through.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Finite = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
MAX_TEXT = (
    1_000_000  # characters of all messages and tools together, or of a prompt; more ids than the model ever sees
)
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=200)]
_MOST_BIASED = 1024
MEANINGLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
NEUTRAL = {"presence_penalty": 0, "frequency_penalty": 0}  # other values are not served


class _Strict(BaseModel):
    """A body may hold millions of mistakes: of a list only the first is looked for, and of unknown fields too."""

    model_config = ConfigDict(extra="forbid", strict=True)
    also: ClassVar[frozenset[str]] = frozenset()  # fields that are known and not kept

    @model_validator(mode="before")
    @classmethod
    def _knows_all_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()} | cls.also
            if unknown := next((name for name in data if name not in known), None):
                raise ValueError(f"there is no field {unknown[:100]!r}")
        return data


class TextPart(_Strict):
    """A part of a message; pictures and sound are refused, and nothing is ever fetched."""

    type: Literal["text"]
    text: Text


class CalledFunction(_Strict):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    arguments: Text = "{}"


class ToolCall(_Strict):
    """What an assistant message has called."""

    id: Annotated[str, Field(max_length=100)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # some clients send back what they were streamed


class ChatMessage(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Name | None = None
    refusal: None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=100)] | None = None
    prefix: bool | None = None  # Mistral's: the last message is the beginning of the answer

    @property
    def size(self) -> int:
        """In characters."""
        content = self.content or ""
        texts = [content] if isinstance(content, str) else [part.text for part in content]
        for call in self.tool_calls or []:
            texts += (call.id, call.function.name, call.function.arguments)
        return sum(map(len, [*texts, self.name or "", self.tool_call_id or ""]))

    def plain(self) -> dict[str, Any]:
        """As `m7mlx.tokens.messages` takes it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            found["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        return found | {k: v for k in ("name", "tool_call_id", "prefix") if (v := getattr(self, k)) is not None}


class Function(_Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(_Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    name: Name


class NamedTool(_Strict):
    """This function and no other."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Strict):
    name: Name = "answer"
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Strict):
    """Text, any JSON object, or the JSON of a schema; enforced, not asked for."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema comes with type json_schema, and with no other")
        return self


class StreamOptions(_Strict):
    include_usage: bool = False


class Generation(_Strict):
    """What both ways of asking have in common."""

    model: str
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=64, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[Finite, Field(ge=-100, le=100)]], Field(max_length=_MOST_BIASED)] | None
    ) = None
    also: ClassVar[frozenset[str]] = frozenset({*MEANINGLESS, *NEUTRAL})

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases_few(cls, data: Any) -> Any:
        """… before each of them is looked at."""
        if isinstance(data, dict) and len(data) > _MOST_BIASED:
            raise ValueError(f"at most {_MOST_BIASED:,} ids can be biased")
        return data

    @model_validator(mode="before")
    @classmethod
    def _drop_what_means_nothing(cls, data: Any) -> Any:
        """… here, and what asks for nothing: null, and penalties of 0."""
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if value is not None and key not in MEANINGLESS and not (key in NEUTRAL and value == NEUTRAL[key])
        }


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def is_continued(self) -> bool:
        """Whether the model continues the last message, instead of answering it."""
        return bool(self.messages[-1].prefix)

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: set it")
        size = sum(message.size for message in self.messages)
        if self.tools and size <= MAX_TEXT:
            size += len(json.dumps([tool.model_dump() for tool in self.tools]))
        if size > MAX_TEXT:
            raise ValueError(f"messages: with tools, {size:,} characters are more than {MAX_TEXT:,}")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("tools: two of them have the same name")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: there are no tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice: there is no tool of that name")
        if self.is_continued and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: an answer that must call a tool has no prefix")
        if self.response_format and self.response_format.type != "text" and names and self.tool_choice != "none":
            raise ValueError("response_format: an answer in JSON cannot call tools")
        return self


class CompletionRequest(Generation):
    """POST /v1/completions: a text or ids to go on from."""

    prompt: Text | Annotated[list[int], Field(min_length=1, max_length=MAX_TEXT, fail_fast=True)]
    echo: Literal[False] = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
