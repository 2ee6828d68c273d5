"""A call that the model wants to make: the user allows it, or not."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from m7mlx.terminal import one_line, visible
from m7mlx_chat.events import WORDS
from m7mlx_chat.focus import give_focus
from m7mlx_chat.screens.dialogs import Dialog
from m7mlx_chat.steps import Call, written


class Approve(Dialog):
    """A call with all of its arguments; gives what the user says to it, None to stop the answer.

    Nothing is chosen at first: an Enter that was meant for the composer allows nothing.
    """

    DEFAULT_CSS = """
    Approve .arguments { height: auto; max-height: 25vh; border-left: outer $accent; padding: 0 1; }
    Approve .arguments:focus { border-left: outer $primary; background: $boost; }
    Approve .arguments Static { height: auto; }
    Approve .hint { padding: 0; }
    Approve OptionList { max-height: 6; }
    """

    def __init__(self, call: Call, about: str) -> None:
        """`about` says whose tool it is."""
        super().__init__()
        self.call = call
        self._about = about

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="box", can_focus=False):
            yield Static(f"The model calls {one_line(self.call.name)[:80]}", classes="title", markup=False)
            yield Static(visible(self._about), markup=False)
            with VerticalScroll(classes="arguments"):
                yield Static(written(self.call), markup=False)
            yield OptionList(
                *[Option(f"{word.capitalize()}: {text}", id=word) for word, text in WORDS.items()], markup=False
            )
            yield Static("↑ ↓ choose · Enter takes it · Tab to the arguments · Esc stops the answer", classes="hint")

    def on_mount(self) -> None:
        options = self.query_one(OptionList)
        options.highlighted = None
        give_focus(options)

    @on(OptionList.OptionSelected)
    def _done(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option_id)
