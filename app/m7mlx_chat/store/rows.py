"""What the store keeps, as values: conversations, and messages in a tree.

A conversation is a tree because nothing said in it is overwritten: an edited question is a sibling
of the old one, a second answer a sibling of the first. `leaf` is the end of the branch that is
shown.
"""

from __future__ import annotations

import re
import struct
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from m7mlx_chat.steps import Step, steps_of

Role = Literal["user", "assistant"]
# How the engine ended an answer: by itself (so are all questions), by the user, by the longest
# length, by a failure.
Ending = Literal["complete", "stopped", "length", "error"]
# Not ended: under way in an instance that lives, or left behind by one that died.
Status = Ending | Literal["answering", "interrupted"]

LATEST = 253370764800.0  # the year 9999, the last one that datetime knows
UNTITLED = "Untitled"
TITLE_LENGTH, CHOSEN_TITLE_LENGTH = 60, 200
_TAG_LENGTH, _MOST_TAGS = 40, 20  # characters of a tag, tags of a conversation
_MOST_BYTES = 1 << 26  # of unpacked ids: 16 million tokens
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One message of a tree whose messages have no ids.

    `parent` is an index into the tree's nodes, always an earlier one; `created` is in seconds since
    1970; `packed_ids` are the ids of its tokens as `pack` makes them.
    """

    parent: int | None
    role: Role
    text: str
    status: Status = "complete"
    created: float
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    packed_ids: bytes | None = field(default=None, repr=False)

    @property
    def thought(self) -> str:
        """What the model thought before, or while, it answered."""
        thought = self.statistics.get("thought")
        return thought if isinstance(thought, str) else ""

    @property
    def steps(self) -> tuple[Step, ...]:
        """What the model did before it answered: the tools that it called."""
        return steps_of(self.statistics.get("steps"))

    @property
    def said_at(self) -> float:
        """When it was said to its end, in seconds since 1970: asked, or answered."""
        ended: Any = self.statistics.get("ended")
        is_time = type(ended) in (int, float) and 0 < ended <= LATEST
        return float(ended) if is_time else self.created

    @property
    def ids(self) -> list[int] | None:
        """The token ids of an answer, if they are known."""
        try:
            return None if self.packed_ids is None else unpack(self.packed_ids)
        except (zlib.error, struct.error, ValueError):  # damaged
            return None


@dataclass(frozen=True, kw_only=True)
class Message(Node):
    """A stored message; `parent` is a message's id.

    It is the `place`-th of `siblings`, from 1: ‹2/3›.
    """

    id: int
    conversation: int
    place: int
    siblings: int


@dataclass(frozen=True, kw_only=True)
class Head:
    """What there is to a conversation besides its messages.

    automatic  nobody chose the title
    pinned     it stands first in the list
    tags       words that it is found by, as `tags_of` makes them
    """

    title: str
    automatic: bool
    created: float
    updated: float
    archived: bool = False
    pinned: bool = False
    tags: tuple[str, ...] = ()
    model: str = ""
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    leaf: int | None = None

    @property
    def hashtags(self) -> str:
        """The tags as they are shown, and searched for: "#work #garden"."""
        return " ".join(f"#{tag}" for tag in self.tags)


@dataclass(frozen=True, kw_only=True)
class Conversation(Head):
    """A stored conversation; `leaf` is a message's id, `messages` how many all branches have."""

    id: int
    deleted_at: float | None
    messages: int


@dataclass(frozen=True, kw_only=True)
class Tree(Head):
    """A whole conversation outside the store; `leaf` is an index into `nodes`."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Asked:
    """A question just stored, and the answer to it that is still to come."""

    conversation: int
    question: int
    answer: int


@dataclass(frozen=True)
class Hit:
    """A message found by a search; the words found are `snippet[a:b]` for a, b in `marks`."""

    message: int
    conversation: int
    title: str
    archived: bool
    role: Role
    created: float
    snippet: str
    marks: tuple[tuple[int, int], ...]


def encodable(text: str) -> str:
    """Replace each lone surrogate by U+FFFD: they cannot be written as UTF-8."""
    return _SURROGATES.sub("�", text)


def title_of(text: str, length: int = TITLE_LENGTH) -> str:
    """A title: the first line of `text` that says something, cut at a word after `length`."""
    lines = (" ".join(_printable(line).split()) for line in text.splitlines())
    line = next(filter(None, lines), UNTITLED)
    if len(line) <= length:
        return line
    return (line[:length].rpartition(" ")[0] or line[: length - 1]) + "…"


def tags_of(text: str) -> tuple[str, ...]:
    """The words of a text as tags: in small letters, without "#" before them, each once."""
    words = unicodedata.normalize("NFC", text.casefold()).replace(",", " ").split()
    tags = (_printable(word).strip("#-")[:_TAG_LENGTH].rstrip("#-") for word in words)
    return tuple(dict.fromkeys(filter(None, tags)))[:_MOST_TAGS]


def changed_tags(tags: Sequence[str], text: str) -> tuple[str, ...]:
    """Tags with those of a text added; "-work" takes one away."""
    words = text.replace(",", " ").split()
    gone = tags_of(" ".join(word[1:] for word in words if word.startswith("-")))
    added = tags_of(" ".join(word for word in words if not word.startswith("-")))
    return tags_of(" ".join([*(tag for tag in tags if tag not in gone), *added]))


def stored_tags(tags: Sequence[str]) -> str:
    """Tags as they are stored: words, with a space between two."""
    return " ".join(tags_of(" ".join(tags)))


def _printable(text: str) -> str:
    """Drop control and format characters, bidi overrides among them; tabs become spaces."""
    kept = (c for c in encodable(text).replace("\t", " ") if unicodedata.category(c) not in ("Cc", "Cf"))
    return "".join(kept)


def pack(ids: Sequence[int]) -> bytes:
    """Token ids in two bytes each or less: their lowest bytes, then the next ones, …, deflated."""
    numbers = struct.pack(f"<{len(ids)}I", *ids)
    return zlib.compress(b"".join(numbers[i::4] for i in range(4)), 1)


def unpack(packed: bytes) -> list[int]:
    """The inverse of `pack`. Raises zlib.error, or ValueError for what `pack` cannot have made."""
    inflate = zlib.decompressobj()
    planes = inflate.decompress(packed, _MOST_BYTES)
    if not inflate.eof or len(planes) % 4:
        raise ValueError("no token ids")
    count = len(planes) // 4
    numbers = bytearray(4 * count)
    for i in range(4):
        numbers[i::4] = planes[i * count : (i + 1) * count]
    return list(struct.unpack(f"<{count}I", numbers))
