"""Tools that do what the test tells them to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from m7mlx_chat.events import Called, Event, Given, Listed, Listing, Seen, Verdict, Word
from m7mlx_chat.steps import Call, Outcome

from m7mlx import Stats


class ScriptedTools:
    """One tool, `look`, of a server "w"; remembers what was asked of it.

    standing  what is done with calls
    """

    def __init__(self, standing: Verdict = "ask") -> None:
        self.is_on = True
        self.is_settled = True
        self.standing = standing
        self.why = ""
        self.made: list[Call] = []
        self.words: list[tuple[str, Word]] = []
        self.cancelled = 0
        self.closed = False
        self.events: list[Event] = []

    def functions(self) -> list[dict[str, Any]]:
        return [{"name": "look", "description": "Looks.", "parameters": {"type": "object"}}] if self.is_on else []

    def judge(self, call: Call) -> tuple[Verdict, str]:
        return self.standing, self.why

    def about(self, call: Call) -> str:
        return "a tool of w: program"

    def remember(self, call: Call, word: Word) -> None:
        self.words.append((call.name, word))

    def forget(self, tool: str) -> bool:
        return tool == "look"

    def make(self, call: Call) -> None:
        self.made.append(call)

    def cancel(self) -> None:
        self.cancelled += 1

    def drain(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def overview(self) -> Sequence[Listing]:
        return [Listing("w", "program", "ready", "", (("look", "Looks.\x1b[2J", "asks"),))]

    def check(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    # --- for the test -----------------------------------------------------------------------------

    def give(self, result: str, outcome: Outcome = "given") -> None:
        """End the last call that was made."""
        self.events.append(Given(self.made[-1].id, outcome, result))

    def settle(self) -> None:
        self.is_settled = True
        self.events.append(Listed("w"))


def called(*arguments: dict[str, Any], text: str = "", first: int = 0) -> Called:
    """What the engine says where the model calls `look`, once for each of the arguments."""
    calls = [Call(f"call{first + n}", "look", json.dumps(one)) for n, one in enumerate(arguments)]
    return Called(text, tuple(calls), Stats(generated_tokens=3), Seen(10, 10))
