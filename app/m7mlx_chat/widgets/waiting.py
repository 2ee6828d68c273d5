"""What was sent during an answer and waits for its turn, in sight above the composer."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events
from textual.widgets import Static

from m7mlx.terminal import visible
from m7mlx_chat.unsent import UnsentText

_LINES = 3


class Waiting(Static):
    """A line for each message that waits; a click takes them back."""

    DEFAULT_CSS = """
    Waiting {
        height: auto; margin: 0 1; padding: 0 1; color: $text-muted; display: none;
        text-wrap: nowrap; text-overflow: ellipsis;
    }
    """

    def __init__(self) -> None:
        super().__init__("", id="waiting", markup=False)

    def show(self, texts: Sequence[UnsentText]) -> None:
        """Show what waits, the next one first."""
        self.display = bool(texts)
        if not texts:
            return
        lines = [f"↳ waits: {' '.join(visible(text.shown).split())}" for text in texts[:_LINES]]
        if len(texts) > _LINES:
            lines[-1] = f"↳ and {len(texts) - _LINES + 1} more wait"
        self.update("\n".join([*lines, "Esc takes " + ("it back" if len(texts) == 1 else "them back")]))

    async def on_click(self, event: events.Click) -> None:
        event.stop()
        await self.run_action("app.take_back")
