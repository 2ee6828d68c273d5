"""POST /v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from m7mlx.errors import InputError
from m7mlx.grammar import MAX_SCHEMA
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.endpoint import Endpoint
from m7mlx_serve.openai.fields import Generation
from m7mlx_serve.openai.replies import ChatChunk, ChatCompletion
from m7mlx_serve.openai.shape import Fields, Shape
from m7mlx_serve.strict import MAX_TEXT, Name, Strict, Text
from m7mlx_serve.tool_calls import MARK
from m7mlx_serve.tool_schema import calls_schema


class TextPart(Strict):
    """A part of a message. Pictures and sound are refused; nothing is ever fetched."""

    type: Literal["text"]
    text: Text


class CalledFunction(Strict):
    """The name and arguments of a call."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    arguments: Text = "{}"


class ToolCall(Strict):
    """A call in a message of the assistant."""

    id: Annotated[str, Field(max_length=100)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # some clients send back what they were streamed


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    reasoning_content: Text | None = None  # what the model thought before it answered
    name: Name | None = None
    refusal: None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=100)] | None = None
    prefix: bool | None = None  # Mistral's: the last message is the beginning of the answer

    @property
    def size(self) -> int:
        """Its length in characters."""
        content = self.content or ""
        texts = [content] if isinstance(content, str) else [part.text for part in content]
        for call in self.tool_calls or []:
            texts += (call.id, call.function.name, call.function.arguments)
        return sum(map(len, [*texts, self.reasoning_content or "", self.name or "", self.tool_call_id or ""]))

    def plain(self) -> dict[str, Any]:
        """The message as `m7mlx.tokens.messages` takes it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            found["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        others = ("reasoning_content", "name", "tool_call_id", "prefix")
        return found | {k: v for k in others if (v := getattr(self, k)) is not None}


class Function(Strict):
    """What the model is told of a function."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: Name


class NamedTool(Strict):
    """A demand to call this function and no other."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """The schema that an answer must fit."""

    name: Name = "answer"
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """Text, any JSON object, or JSON that fits a schema. It is enforced, not merely asked for."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema comes with type json_schema, and with no other")
        return self


class ChatShape(Shape):
    """A choice is a message of the assistant, which may call tools."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    logprobs_end: ClassVar[Mapping[str, Any]] = {"refusal": None}

    def opening(self) -> Fields | None:
        """The role, which comes before any text."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str = "", thought: str = "", call: Fields | None = None) -> Fields:
        """More of the message's text, of what the model thinks, or of a call."""
        if call is not None:
            return {"delta": {"tool_calls": [call]}}
        told = {"reasoning_content": thought, "content": text}
        return {"delta": {field: value for field, value in told.items() if value}}

    def whole(self, text: str, calls: Sequence[Fields], thought: str) -> Fields:
        """The whole message."""
        message: Fields = {"role": "assistant", "content": text, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message |= {"content": text or None, "tool_calls": list(calls)}
        return {"message": message}

    def logprobs(self, scored: Sequence[Fields], offset: int) -> dict[str, list[Any]]:
        """One list of tokens."""
        return {"content": list(scored)}


class ChatRequest(Generation):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Name | None = None  # how much to think, for models that are told so
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    shape: ClassVar[Shape] = ChatShape()

    @property
    def is_continued(self) -> bool:
        """Whether the model continues the last message, instead of answering it."""
        return bool(self.messages[-1].prefix)

    @property
    def required_tools(self) -> list[Tool] | None:
        """The tools one of which must be called; None where the model may answer otherwise."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools or [] if tool.function.name == name]
        return self.tools if self.tool_choice == "required" else None

    @property
    def starts_message(self) -> bool:
        """Whether the answer begins a message: it does, unless one is continued."""
        return not self.is_continued

    @property
    def tool_use(self) -> Literal["none", "allowed", "required"]:
        """Whether the answer may, or must, call tools."""
        if not self.tools or self.tool_choice == "none":
            return "none"
        return "allowed" if self.required_tools is None else "required"

    @property
    def answer_schema(self) -> Mapping[str, Any] | None:
        """The JSON schema of the calls that are demanded, or of the answer."""
        if (tools := self.required_tools) is not None:
            functions = [tool.function.model_dump() for tool in tools]
            return calls_schema(functions, self.parallel_tool_calls is not False)
        if self.response_format is None or self.response_format.type == "text":
            return None
        wanted = self.response_format.json_schema
        return wanted.schema_ if wanted else {"type": "object"}

    @property
    def demanded_calls(self) -> Mapping[str, Any] | None:
        """The calls that are demanded, for models that write names before arguments."""
        if (tools := self.required_tools) is None:
            return None
        functions = {tool.function.name: tool.function.parameters for tool in tools}
        return {"functions": functions, "parallel": self.parallel_tool_calls is not False}

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the client wants."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """How many of the likeliest tokens to tell the log probability of; None for none."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def without_texts(self) -> Self:
        """Leave out messages and tools, save for the schemas that the answer must follow."""
        required = self.required_tools or []
        schemas = [tool.function.parameters for tool in required]
        if self.response_format and self.response_format.json_schema:
            schemas.append(self.response_format.json_schema.schema_)
        if sum(len(json.dumps(schema)) for schema in schemas) > MAX_SCHEMA:
            raise InputError(f"the JSON schema is longer than {MAX_SCHEMA:,} characters")
        parameters = {tool.function.name: tool.function.parameters for tool in required}
        names = [tool.function.name for tool in self.tools or []]
        tools = [
            Tool(type="function", function=Function(name=name, parameters=parameters.get(name, {}))) for name in names
        ]
        last = self.messages[-1]
        empty = [ChatMessage(role=last.role, content="", prefix=last.prefix)]
        return self.model_copy(update={"messages": empty, "tools": tools or None})

    def _encode_prompt(self, tokenizer: Tokenizer) -> array[int]:
        tools = self.tools or [] if self.tool_choice != "none" else []
        mark = tokenizer.control_id(MARK)
        if tools and mark is None:
            raise InputError("this model's chat format has no tools; leave out tools")
        messages = [message.plain() for message in self.messages]
        told = [tool.model_dump(exclude_none=True) for tool in tools]
        schema = None if self.required_tools else self.answer_schema
        ids = array("i", tokenizer.chat.encode(messages, told, effort=self.reasoning_effort, schema=schema))
        if self.required_tools is not None and mark is not None:
            ids.append(mark)
        return ids

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
        in_json = self.response_format is not None and self.response_format.type != "text"
        if in_json and names and self.tool_choice != "none":
            raise ValueError("response_format: an answer in JSON cannot call tools")
        if in_json and self.is_continued:
            raise ValueError("response_format: an answer in JSON has no prefix")
        return self


ENDPOINT = Endpoint("/v1/chat/completions", "Answer a conversation", ChatRequest, ChatCompletion, ChatChunk)
