"""One endpoint of an API: where its clients send what, and the shapes of what they are answered.

Nothing here needs MLX: bodies are read in a process of its own that has a tokenizer and no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel

from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.strict import Strict


class Body(Strict, ABC):
    """What a client sends: JSON with at least these fields."""

    model: str
    stream: bool = False

    @abstractmethod
    def encode(self, tokenizer: Tokenizer) -> array[int]:
        """The ids of the prompt. Raises InputError for what the model cannot do."""

    @abstractmethod
    def without_texts(self) -> Self:
        """The body as it stays once its prompt is encoded: options, and schemas of the answer."""


@dataclass(frozen=True)
class Endpoint:
    """A path that bodies are sent to.

    summary  what it is for, in a few words
    body     the shape of what clients send
    reply    the shape of a whole answer
    chunk    the shape of one event of a stream
    """

    path: str
    summary: str
    body: type[Body]
    reply: type[BaseModel]
    chunk: type[BaseModel]


@dataclass(frozen=True)
class ReadRequest:
    """A request that has been read: its body without texts, and the ids of its prompt."""

    body: Body
    ids: array[int]
