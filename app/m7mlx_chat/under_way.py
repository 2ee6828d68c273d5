"""The answer under way, as far as it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from m7mlx_chat.settings import Settings
from m7mlx_chat.steps import Call, Step, values_of


@dataclass
class UnderWay:
    """The answer under way: where it goes, how it is made, and all that it says so far.

    begun           what it said before it was broken off: a text, and its token ids where known
    earlier_tokens  how many tokens that took
    thought         what the model has thought by now
    submitted       the engine has been asked; before, the model is still being loaded
    saved           when it was last saved
    steps           what it has done so far: the tools that the model called
    rounds          how many of these steps the user has not seen the end of
    asking          the call that waits for the user's word
    calling         the call that is being made
    is_stopped      the user has stopped it: no call is made any more
    """

    conversation: int
    question: int
    answer: int
    settings: Settings
    text: str = ""
    begun: tuple[str, list[int] | None] | None = None
    earlier_tokens: int = 0
    thought: str = ""
    submitted: bool = False
    saved: float = 0.0
    steps: list[Step] = field(default_factory=list)
    rounds: int = 0
    asking: Call | None = None
    calling: Call | None = None
    is_stopped: bool = False

    @property
    def waits(self) -> bool:
        """Whether it goes on when a call has ended, not before."""
        return self.asking is not None or self.calling is not None

    @property
    def spent(self) -> dict[str, Any]:
        """What it has cost, if it ends between two passes."""
        return {"generated_tokens": self.earlier_tokens} if self.earlier_tokens else {}

    def with_steps(self, statistics: dict[str, Any]) -> dict[str, Any]:
        """What is kept of it, with its steps."""
        return statistics | {"steps": values_of(self.steps)} if self.steps else statistics
