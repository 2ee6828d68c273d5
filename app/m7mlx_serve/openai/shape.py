"""How an endpoint writes an answer, whole or in chunks: what differs between the two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

Fields = dict[str, Any]
Scored = tuple[Fields, int]
"""A token with its log probabilities, and how many characters stand before it."""


class Shape(ABC):
    """The fields of one endpoint's answers.

    id_prefix     how the ids of answers begin
    whole_object  the field `object` of a whole answer; chunk_object, of a chunk
    logprobs_end  what follows the lists in the field `logprobs`
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    logprobs_end: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def opening(self) -> Fields | None:
        """The content of a stream's first chunk, before any text; None where there is none."""

    @abstractmethod
    def delta(self, text: str = "", thought: str = "", call: Fields | None = None) -> Fields:
        """The content of a chunk: more of the text, of what the model thinks, or of a tool call."""

    @abstractmethod
    def whole(self, text: str, calls: Sequence[Fields], thought: str) -> Fields:
        """The content of a whole answer."""

    @abstractmethod
    def logprobs(self, scored: Sequence[Scored]) -> dict[str, list[Any]]:
        """The lists in the field `logprobs`."""
