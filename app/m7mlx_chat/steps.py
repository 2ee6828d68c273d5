"""What a model did before it answered: the tools that it called, and what they gave.

An answer with tools is made in steps: the model says something and calls tools, is told what they
gave, and so on, until it answers. The steps are kept with the answer, so that versions, forks and
exports of a conversation have them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from m7mlx.errors import ChatFormatError
from m7mlx.terminal import visible
from m7mlx.tokens.messages import parse_json

# How a call ended: the tool gave something, or an error; the user did not allow it; it was stopped,
# or never begun. "open" is one that has not ended.
Outcome = Literal["open", "given", "failed", "refused", "stopped"]
_SHOWN = 20_000  # characters of arguments
_INSTEAD: dict[Outcome, str] = {
    "open": "The call was not made.",
    "refused": "The user does not allow this call.",
    "stopped": "The call was stopped.",
}


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    name       as the model knows the tool
    arguments  as the model wrote them: JSON, or what was meant to be
    result     what the tool gave, or why there is nothing
    """

    id: str
    name: str
    arguments: str
    outcome: Outcome = "open"
    result: str = ""

    @property
    def values(self) -> dict[str, Any] | None:
        """The arguments as an object; None if they are none."""
        try:
            found = parse_json(self.arguments or "{}")
        except ChatFormatError:
            return None
        return found if isinstance(found, dict) else None

    @property
    def asked(self) -> dict[str, str]:
        """What the model asks for."""
        return {"id": self.id, "name": self.name, "arguments": self.arguments}


def written(call: Call) -> str:
    """The arguments, to be read by people; a very long end is left out, and told."""
    values = call.values
    text = call.arguments if values is None else json.dumps(values, ensure_ascii=False, indent=2)
    more = f"\n… ({len(text) - _SHOWN:,} more characters)" if len(text) > _SHOWN else ""
    return visible(text[:_SHOWN]) + more


@dataclass(frozen=True)
class Step:
    """What the model said, and which tools it called then."""

    text: str
    calls: tuple[Call, ...]

    @property
    def open_call(self) -> Call | None:
        """The first call that has not ended."""
        return next((call for call in self.calls if call.outcome == "open"), None)

    def with_call(self, call: Call) -> Step:
        """The step with a call in the place of the one that has the same id."""
        return Step(self.text, tuple(call if one.id == call.id else one for one in self.calls))


def closed(steps: Sequence[Step]) -> list[Step]:
    """Steps whose open calls are stopped: nobody makes them any more."""
    return [Step(step.text, tuple(_stopped(call) for call in step.calls)) for step in steps]


def _stopped(call: Call) -> Call:
    return replace(call, outcome="stopped") if call.outcome == "open" else call


def messages_of(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """The steps as the model is told of them."""
    messages: list[dict[str, Any]] = []
    for step in steps:
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _written(call)}}
            for call in step.calls
        ]
        messages.append({"role": "assistant", "content": step.text, "tool_calls": calls})
        for call in step.calls:
            result = call.result or _INSTEAD.get(call.outcome, "")
            messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result})
    return messages


def _written(call: Call) -> str:
    """The arguments as every chat format takes them: an object."""
    return call.arguments or "{}" if call.values is not None else json.dumps({"arguments": call.arguments})


def values_of(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """The steps as JSON."""
    return [{"text": step.text, "calls": [asdict(call) for call in step.calls]} for step in steps]


def steps_of(values: Any) -> tuple[Step, ...]:
    """The steps in JSON that may be damaged, or a stranger's; what is none is left out."""
    steps = []
    for one in values if isinstance(values, list) else ():
        if isinstance(one, Mapping) and isinstance(one.get("text"), str) and isinstance(one.get("calls"), list):
            calls = tuple(call for value in one["calls"] if (call := _call_of(value)) is not None)
            if calls:
                steps.append(Step(one["text"], calls))
    return tuple(steps)


def _call_of(value: Any) -> Call | None:
    names = ("id", "name", "arguments", "outcome", "result")
    if not isinstance(value, Mapping) or not all(isinstance(value.get(name), str) for name in names):
        return None
    return Call(**{name: value[name] for name in names}) if value["outcome"] in get_args(Outcome) else None
