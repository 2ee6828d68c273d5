"""Two versions of a message beside each other, and what differs between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from m7mlx.terminal import visible
from m7mlx.units import counted
from m7mlx_chat.catalog import short_name
from m7mlx_chat.differences import differences
from m7mlx_chat.focus import give_focus
from m7mlx_chat.markdown import answer_markdown
from m7mlx_chat.store.rows import Message

_SHOWN = 50_000  # characters of each


class SideBySide(ModalScreen[int | None]):
    """Two of several versions; gives the id of the one to go on with, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left_square_bracket", "turn(-1)", show=False),
        Binding("right_square_bracket", "turn(1)", show=False),
        Binding("d", "compare", show=False),
        Binding("1", "take(0)", show=False),
        Binding("2", "take(1)", show=False),
    ]
    DEFAULT_CSS = """
    SideBySide { align: center middle; background: $background 70%; }
    SideBySide .box { width: 96%; height: 92%; padding: 0 1; border: round $primary; background: $surface; }
    SideBySide .columns { height: 1fr; }
    SideBySide.-narrow .columns { layout: vertical; }
    SideBySide .column { width: 1fr; height: 1fr; padding: 0 1; }
    SideBySide .title { text-style: bold; height: auto; color: $text-accent; }
    SideBySide .hint { color: $text-muted; height: auto; }
    """

    def __init__(self, versions: Sequence[Message], left: int, right: int) -> None:
        """`left` and `right` are the places of the two in `versions` that are shown first."""
        super().__init__()
        self._versions = versions
        self._shown = [left, right]
        self._compares = False

    def compose(self) -> ComposeResult:
        hint = "1, 2 goes on with it · d what differs, or not · Esc leaves"
        others = "[ ] others on the left · " if len(self._versions) > 2 else ""
        with Vertical(classes="box"):
            with Horizontal(classes="columns"):
                for side in ("left", "right"):
                    yield VerticalScroll(classes="column", id=side)
            yield Static(others + hint, classes="hint", markup=False)

    def on_mount(self) -> None:
        give_focus(self.query_one("#left"))
        self._show()

    def action_turn(self, direction: int) -> None:
        """Show another version on the left: the next one (1), or the one before (-1)."""
        place = self._shown[0]
        for _ in self._versions:
            place = (place + direction) % len(self._versions)
            if place != self._shown[1]:
                break
        self._shown[0] = place
        self._show()

    def action_compare(self) -> None:
        """Mark what differs, or show the answers as they are."""
        self._compares = not self._compares
        self._show()

    def action_take(self, side: int) -> None:
        """Go on with the version on a side."""
        self.dismiss(self._versions[self._shown[side]].id)

    @work(exclusive=True)
    async def _show(self) -> None:
        messages = [self._versions[place] for place in self._shown]
        texts = [visible(message.text[:_SHOWN]) for message in messages]
        marked = differences(*texts) if self._compares else None
        for side, (name, message) in enumerate(zip(("#left", "#right"), messages, strict=True)):
            column = self.query_one(name, VerticalScroll)
            await column.remove_children()
            await column.mount(Static(f"{side + 1}  {about(message)}", classes="title", markup=False))
            if marked is not None:
                await column.mount(Static(marked[side]))
            elif message.role == "user":
                await column.mount(Static(texts[side], markup=False))
            else:
                answer = answer_markdown()
                await column.mount(answer)
                await answer.update(texts[side])


def about(message: Message) -> str:
    """What made a version: its place, model and figures."""
    s = message.statistics
    facts = [
        f"‹{message.place}/{message.siblings}›",
        short_name(message.model) if message.role == "assistant" else "",
    ]
    if tokens := s.get("generated_tokens"):
        facts.append(counted(tokens, "token"))
    if speed := s.get("generation_tps"):
        facts.append(f"{speed:.1f} tok/s")
    return visible(" · ".join(filter(None, facts)))
