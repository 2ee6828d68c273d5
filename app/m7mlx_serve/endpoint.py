"""One endpoint of an API: where its clients send what, and the shapes of what they are answered.

Nothing here needs MLX: bodies are read in a process of its own that has a tokenizer and no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import BaseModel

from m7mlx.grammar import Grammar
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tools.calling import ToolUse
from m7mlx_serve.errors import ApiError
from m7mlx_serve.strict import Strict


@dataclass(frozen=True)
class Prompts:
    """What the model reads, and what its answers must keep to.

    ids         the ids of each prompt
    schema      a JSON schema, or a grammar, that every answer follows
    tool_use    whether answers may, or must, call tools
    at_start    whether an answer begins a message, not amid a text
    held        the conversation as JSON, if its API holds it for requests that go on from it
    prediction  ids that the answer may be made of to a large part
    """

    ids: Sequence[array[int]]
    schema: Mapping[str, Any] | Grammar | None = None
    tool_use: ToolUse = "none"
    at_start: bool = False
    held: bytes = b""
    prediction: array[int] = field(default_factory=lambda: array("i"))


@dataclass(frozen=True)
class Wanted:
    """How a client wants its answers, whatever its API calls it; None leaves it to the server.

    n                answers to each prompt
    logprobs         tell the log probability of each token, and of so many of the likeliest
    prompt_logprobs  the same of the prompt's tokens
    """

    n: int = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class Body(Strict, ABC):
    """What a client sends: JSON with these fields and more.

    model  which model is to answer; "" is the one that is served
    """

    model: str = ""
    stream: bool = False

    def following(self, held: Mapping[str, bytes]) -> Self:
        """The body behind the conversation that it goes on from, one of those `held`, by id.

        Raises ApiError for one that is not held.
        """
        return self

    @abstractmethod
    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """What the model reads. Raises InputError for what it cannot do."""

    @abstractmethod
    def wanted(self) -> Wanted:
        """How the answers are wanted; still known once texts are left out."""

    @abstractmethod
    def without_texts(self) -> Self:
        """The body as it stays once its prompts are encoded: no messages, tools and schemas."""


@dataclass(frozen=True)
class Endpoint:
    """A path that bodies are sent to.

    summary  what it is for, in a few words
    body     the shape of what clients send
    reply    the shape of a whole answer
    chunk    the shape of one event of a stream
    error    an error as the API's clients read it, and its shape
    """

    path: str
    summary: str
    body: type[Body]
    reply: type[BaseModel]
    chunk: type[BaseModel]
    error: Callable[[ApiError], dict[str, Any]]
    error_reply: type[BaseModel]


@dataclass(frozen=True)
class ReadRequest:
    """A request that has been read: its body without texts, and its prompts."""

    body: Body
    prompts: Prompts
