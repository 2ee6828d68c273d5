"""The list of what can follow what is being typed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from m7mlx.terminal import visible
from m7mlx_chat.completing import Choice


class Completion(OptionList, can_focus=False):
    """A list above the composer; the composer, which keeps the focus, moves in it."""

    DEFAULT_CSS = """
    Completion {
        height: auto; max-height: 8; margin: 0 1; padding: 0 1; border: round $primary 40%;
        background: $surface; display: none;
    }
    Completion.-open { display: block; }
    """

    def __init__(self) -> None:
        super().__init__(markup=False)
        self._choices: Sequence[Choice] = ()
        self.typed = ""

    @property
    def is_open(self) -> bool:
        return self.has_class("-open")

    @property
    def chosen(self) -> Choice:
        return self._choices[self.highlighted or 0]

    @property
    def is_exact(self) -> bool:
        """Whether all of the choice has been typed already."""
        return not self.chosen.is_file and self.chosen.text.strip() == self.typed

    def open(self, choices: Sequence[Choice], typed: str) -> None:
        """Show `choices` for what was `typed`; nothing where there are none."""
        if self.is_open and typed == self.typed and choices == self._choices:
            return  # what is highlighted stays
        self._choices, self.typed = choices, typed
        self.clear_options()
        self.add_options([Option(_line(choice)) for choice in choices])
        self.highlighted = 0 if choices else None
        self.set_class(bool(choices), "-open")

    def close(self) -> None:
        self.remove_class("-open")

    def move(self, direction: int) -> None:
        if direction > 0:
            self.action_cursor_down()
        else:
            self.action_cursor_up()


def _line(choice: Choice) -> Text:
    return Text.assemble((f"{visible(choice.shown):<28}", "bold"), (choice.about, "dim"), no_wrap=True)
