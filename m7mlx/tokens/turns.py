"""Conversations as Mistral's formats see them: turns of one role, neighbours joined.

The rules are those of mistral-common's normalizers, one for each version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from m7mlx.tokens.messages import Message

_BETWEEN = "\n\n"


class Thought(NamedTuple):
    """What the model thinks, or an example of it in a system prompt."""

    text: str
    is_closed: bool = True


Content = list[str | Thought]


@dataclass
class Turn:
    """One turn.

    ids      what an answer was generated as
    call_id  which call a tool's result answers; name, of which function
    """

    role: str
    content: Content = field(default_factory=list)
    calls: list[Mapping[str, Any]] = field(default_factory=list)
    ids: Sequence[int] = ()
    call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The text of the content, without thoughts."""
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def is_plain(self) -> bool:
        """Whether there are no thoughts."""
        return all(isinstance(part, str) for part in self.content)


def join_turns(messages: Sequence[Message], *, keeps_system: bool, between_parts: str = _BETWEEN) -> list[Turn]:
    """Join neighbours of one role by a blank line, except for system prompts and tools' results.

    keeps_system   whether system prompts are turns of their own, as from v7 on; else they are left
                   out, and the first turn is always the user's, empty if need be
    between_parts  what joins the text parts of one message
    """
    turns: list[Turn] = []
    for role, run in groupby(messages, key=lambda m: m["role"]):
        group = list(run)
        if role == "tool" or (role == "system" and keeps_system):
            turns += [_turn(role, [message], between_parts) for message in group]
        elif role != "system":
            turns.append(_turn(role, group, between_parts))
    if not turns or not (keeps_system or turns[0].role == "user"):
        turns.insert(0, Turn("user"))
    return turns


def _turn(role: str, messages: Sequence[Message], between_parts: str) -> Turn:
    first = messages[0]
    return Turn(
        role,
        _joined(map(_parts, messages), between_parts),
        [call for message in messages for call in message.get("tool_calls") or ()],
        first.get("ids") or () if len(messages) == 1 else (),
        first.get("tool_call_id"),
        first.get("name"),
    )


def _parts(message: Message) -> Content:
    content = message.get("content")
    parts: Content = [content] if isinstance(content, str) else [_part(part) for part in content or ()]
    thought = message.get("reasoning_content")
    return [Thought(thought), *parts] if thought is not None else parts


def _part(part: Mapping[str, Any]) -> str | Thought:
    if part["type"] == "text":
        text: str = part["text"]
        return text
    return Thought(part["thinking"], part.get("closed") is not False)


def _joined(contents: Iterable[Content], between_parts: str) -> Content:
    """Join what is text side by side; empty texts are left out."""
    joined: Content = []
    texts: list[str] = []
    for parts in contents:
        between = _BETWEEN
        for part in parts:
            if isinstance(part, Thought):
                joined += ["".join(texts)] if texts else []
                joined.append(part)
                texts = []
            elif part:
                texts.append(between + part if texts else part)
                between = between_parts
    return joined + (["".join(texts)] if texts else [])


def in_call_order(turns: Sequence[Turn]) -> list[Turn]:
    """Put the results of one answer's calls into the order of the calls."""
    ordered: list[Turn] = []
    called: list[str] = []
    for role, run in groupby(turns, key=lambda turn: turn.role):
        group = list(run)
        if role == "assistant":
            called += [call["id"] for turn in group for call in turn.calls if call.get("id")]
        elif role == "tool":
            places = {call_id: n for n, call_id in enumerate(called)}
            own = {turn.call_id: n for n, turn in enumerate(group)}
            group.sort(key=lambda turn: (places.get(turn.call_id or "", len(called)), own[turn.call_id]))
            called = []
        ordered += group
    return ordered
