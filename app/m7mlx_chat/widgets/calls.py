"""What a model did before it answered: calls of tools, each folded into a line."""

from __future__ import annotations

import json
from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from m7mlx.terminal import one_line, visible
from m7mlx_chat.markdown import answer_markdown
from m7mlx_chat.steps import Call, Outcome, Step, written

_SHOWN = 20_000  # characters of a step's text, of arguments and of a result
_MARKS: dict[Outcome, str] = {
    "open": "…",
    "given": "✓",
    "failed": "✗",
    "refused": "✗ not allowed",
    "stopped": "✗ stopped",
}


class CallView(Vertical):
    """A call: its name, its arguments and how it ended in a line; a click shows all of it."""

    DEFAULT_CSS = """
    CallView { height: auto; }
    CallView Static { height: auto; }
    CallView .call { height: 1; color: $text-accent; text-wrap: nowrap; text-overflow: ellipsis; }
    CallView .given { display: none; padding: 0 0 1 2; color: $text-muted; }
    CallView.-shown .given { display: block; }
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call
        self._title = Static("", classes="call", markup=False)
        self._body = Static("", classes="given", markup=False)

    def compose(self) -> ComposeResult:
        yield self._title
        yield self._body
        self.show(self._call)

    def show(self, call: Call) -> None:
        """Show the call as it is now."""
        self._call = call
        is_shown = self.has_class("-shown")
        why = f" {one_line(call.result)[:80]}" if call.outcome == "failed" else ""
        fold = "▾" if is_shown else "▸"
        self._title.update(f"{fold} {_MARKS[call.outcome]} {one_line(call.name)[:80]} {_short(call)}{why}")
        if is_shown:
            self._body.update(f"{written(call)}\n\n{visible(call.result[:_SHOWN])}".rstrip())

    def toggle(self, is_shown: bool) -> None:
        """Show all of it, or a line."""
        self.set_class(is_shown, "-shown")
        self.show(self._call)

    def on_click(self) -> None:
        self.toggle(not self.has_class("-shown"))


class StepsView(Vertical):
    """The steps of an answer, in order."""

    DEFAULT_CSS = "StepsView { height: auto; }"

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self._steps = steps
        self._count = 0

    async def on_mount(self) -> None:
        await self.show(self._steps)

    async def show(self, steps: Sequence[Step]) -> bool:
        """Show the steps as they are now; returns whether there are more than before."""
        self._steps, before = steps, self._count
        self._count = len(steps)
        for step in steps[before:]:
            if step.text.strip():
                text = answer_markdown()
                await self.mount(text)
                await text.update(visible(step.text[:_SHOWN]))
            await self.mount_all([CallView(call) for call in step.calls])
        calls = [call for step in steps for call in step.calls]
        for view, call in zip(self.query(CallView), calls, strict=False):
            view.show(call)
        return self._count > before

    def toggle(self) -> None:
        """Show all of the calls, or a line for each."""
        views = list(self.query(CallView))
        is_shown = not any(view.has_class("-shown") for view in views)
        for view in views:
            view.toggle(is_shown)


def _short(call: Call) -> str:
    """The arguments in a part of a line."""
    values = call.values
    if values is None:
        return one_line(call.arguments)[:60]
    return one_line(
        ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items())[:120]
    )
