"""The shapes of what Ollama's clients are answered, for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OllamaCall(_Reply):
    class Function(_Reply):
        name: str
        arguments: dict[str, Any]

    function: Function


class OllamaMessage(_Reply):
    role: Literal["assistant"]
    content: str
    thinking: str = ""
    tool_calls: list[OllamaCall] = Field(default_factory=list)


class _Line(_Reply):
    """One line of a stream, or a whole answer; the last has durations, in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: Count | None = None
    load_duration: Literal[0] | None = None
    prompt_eval_count: Count | None = None
    prompt_eval_duration: Count | None = None
    eval_count: Count | None = None
    eval_duration: Count | None = None


class ChatLine(_Line):
    message: OllamaMessage


class TextLine(_Line):
    response: str
    thinking: str = ""


class OneVector(_Reply):
    embedding: list[float]


class Vectors(_Reply):
    model: str
    embeddings: list[list[float]]
    total_duration: Count
    load_duration: Literal[0]
    prompt_eval_count: Count


class Details(_Reply):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Shown(_Reply):
    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class TagList(_Reply):
    class Tag(_Reply):
        name: str
        model: str
        modified_at: str
        size: Count
        digest: str
        details: Details

    models: list[Tag]


class RunningList(_Reply):
    class Running(TagList.Tag):
        size_vram: Count
        expires_at: str
        context_length: Count

    models: list[Running]


class OllamaVersion(_Reply):
    version: str


class OllamaError(_Reply):
    """Every refusal and failure; in a stream that has begun, its last line."""

    error: str
