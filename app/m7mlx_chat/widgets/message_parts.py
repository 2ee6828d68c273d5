"""What stands above, below and beside a message: when it was said, its versions, its thoughts."""

from __future__ import annotations

from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from m7mlx.terminal import visible
from m7mlx.units import counted
from m7mlx_chat.dates import full_time, short_time
from m7mlx_chat.store.rows import Message

SHOWN = 200_000  # characters of a message; /copy and /export have all of it


class When(Static):
    """When a message was asked or answered; in full where the message is selected."""

    ALLOW_SELECT = False

    def __init__(self, seconds: float) -> None:
        super().__init__("", classes="when", markup=False)
        self.seconds = seconds
        self.show()

    def show(self, *, in_full: bool = False) -> None:
        """Show the time as it is told today."""
        self.tooltip = full_time(self.seconds) or None
        self.update(full_time(self.seconds) if in_full else short_time(self.seconds))


class Versions(Static):
    """‹2/3›: which of several versions is shown; a click on either side shows the next."""

    def __init__(self, message: Message) -> None:
        super().__init__(f"‹ {message.place}/{message.siblings} ›", classes="versions", markup=False)
        self._message = message.id

    def on_click(self, event: events.Click) -> None:
        direction = -1 if event.x < self.size.width // 2 else 1
        # Not from here: it removes this very widget, and would wait for it for ever.
        self.app.call_later(self.run_action, f"app.sibling_of({self._message}, {direction})")
        event.stop()


class Thoughts(Vertical):
    """What a model thought, folded into a line; a click on that shows or hides it."""

    DEFAULT_CSS = """
    Thoughts { height: auto; color: $text-muted; }
    Thoughts Static { height: auto; }
    Thoughts .thought { display: none; padding: 0 0 1 2; }
    Thoughts.-shown .thought { display: block; }
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self._title = Static("", classes="fold", markup=False)
        self._body = Static("", classes="thought", markup=False)
        self.add(text)

    def compose(self) -> ComposeResult:
        yield self._title
        yield self._body

    def add(self, text: str) -> None:
        """Add more of it. There is nothing to see while it is empty."""
        self.text += text
        self.display = bool(self.text)
        self._show()

    def toggle(self) -> None:
        """Show the thoughts, or hide them again."""
        self.toggle_class("-shown")
        self._show()

    def on_click(self) -> None:
        self.toggle()

    def _show(self) -> None:
        is_shown = self.has_class("-shown")
        self._title.update(f"{'▾' if is_shown else '▸'} thinking · {counted(len(self.text), 'character')}")
        if is_shown:
            self._body.update(visible(self.text[:SHOWN]))
