"""POST /v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.conversation import Conversation
from m7mlx_serve.endpoint import Endpoint, Prompts
from m7mlx_serve.errors import ApiError
from m7mlx_serve.openai.fields import ADVICE, MEANINGLESS, NEUTRAL, Generation
from m7mlx_serve.openai.messages import ChatMessage, TextPart
from m7mlx_serve.openai.replies import ChatChunk, ChatCompletion, ErrorReply
from m7mlx_serve.openai.shape import Fields, Scored, Shape
from m7mlx_serve.strict import MAX_TEXT, Name, Strict, Text

# What Mistral's own API puts before a conversation that asks for it.
_SAFE = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid harmful, "
    "unethical, prejudiced, or negative content. Ensure replies promote fairness and positivity."
)


class Function(Strict):
    """What the model is told of a function."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: Function
    ignored = frozenset({"cache_control"})


class NamedFunction(Strict):
    """The name of a function."""

    name: Name


class NamedTool(Strict):
    """A demand to call this function and no other."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Strict):
    """The schema that an answer must fit."""

    name: Name = "answer"
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = Field(default_factory=lambda: {"type": "object"})
    strict: bool | None = None


class ResponseFormat(Strict):
    """Text, any JSON object, or JSON that fits a schema. It is enforced, not merely asked for.

    Some clients give the schema as `value` or `schema`, beside the type.
    """

    type: Literal["text", "json", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    value: dict[str, Any] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    @model_validator(mode="after")
    def _has_one_schema(self) -> ResponseFormat:
        given = [one for one in (self.json_schema, self.value, self.schema_) if one is not None]
        if len(given) > 1 or (given and self.type == "text"):
            raise ValueError("one schema is given, in json_schema, and none with type text")
        if not given and self.type == "json_schema":
            raise ValueError("json_schema is missing, which type json_schema asks for")
        return self

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The schema of the answer, if it has to be JSON."""
        if self.type == "text":
            return None
        if self.json_schema is not None:
            return self.json_schema.schema_
        return self.value or self.schema_ or {"type": "object"}


class Prediction(Strict):
    """What the answer will be like: then it may come sooner, and is the same."""

    type: Literal["content"] = "content"
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        """The predicted text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @model_validator(mode="after")
    def _is_short(self) -> Prediction:
        if (size := len(self.text)) > MAX_TEXT:
            raise ValueError(f"{size:,} characters are more than {MAX_TEXT:,}")
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

    def logprobs(self, scored: Sequence[Scored]) -> dict[str, list[Any]]:
        """One list of tokens."""
        return {"content": [token for token, _ in scored]}


class ChatRequest(Generation):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=512, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required", "any"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    reasoning_effort: Name | None = None  # how much to think, for models that are told so
    safe_prompt: bool = False  # Mistral's
    ignored = MEANINGLESS
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        **NEUTRAL,
        "modalities": [["text"]],
        "verbosity": ["medium"],
        "functions": [[]],
        "function_call": ["none"],
        "echo": [False],
        "best_of": [1],
        "add_generation_prompt": [True],
        "continue_final_message": [False],
        "ignore_eos": [False],
        "use_beam_search": [False],
    }
    advice: ClassVar[Mapping[str, str]] = {
        **ADVICE,
        "functions": "this old field is not read; give the functions in tools",
        "function_call": "this old field is not read; use tool_choice",
        "modalities": 'the model answers with text alone; leave it out, or give ["text"]',
        "audio": "the model answers with text alone; leave it out",
        "web_search_options": "the server fetches nothing; give the model a tool that searches",
    }
    shape: ClassVar[Shape] = ChatShape()

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the client wants."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """How many of the likeliest tokens to tell the log probability of; None for none."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> Conversation:
        """What is to be answered."""
        given = self.tool_choice
        named = given.function.name if isinstance(given, NamedTool) else None
        messages = [message.plain() for message in self.messages]
        return Conversation(
            [{"role": "system", "content": _SAFE}, *messages] if self.safe_prompt else messages,
            [tool.function.model_dump(exclude={"strict"}) for tool in self.tools or []],
            "required" if named is not None or given == "any" else given or "auto",  # type: ignore[arg-type]
            named,
            self.parallel_tool_calls is not False,
            self.response_format.wanted if self.response_format else None,
            self.reasoning_effort,
        )

    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """The ids of the conversation, what the answer follows, and what is predicted of it."""
        found = self.conversation().prompts(tokenizer)
        if self.prediction is None:
            return found
        return replace(found, prediction=array("i", tokenizer.encode(self.prediction.text)))

    def without_texts(self) -> Self:
        """Leave out messages, tools and schemas."""
        nothing = {"tools": None, "tool_choice": None, "response_format": None, "prediction": None}
        return self.model_copy(update={"messages": [ChatMessage(role="user", content="")], **nothing})

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: set it")
        if self.prediction and self.n > 1:
            raise ValueError("prediction: it is that of one answer; leave out n")
        return self


ENDPOINT = Endpoint(
    "/v1/chat/completions",
    "Answer a conversation",
    ChatRequest,
    ChatCompletion,
    ChatChunk,
    ApiError.body,
    ErrorReply,
)
