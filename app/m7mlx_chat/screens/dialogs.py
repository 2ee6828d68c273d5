"""Small screens: the help, a line to type, a list to search, figures to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from m7mlx.terminal import visible
from m7mlx_chat.actions import ACTIONS, Action, Place, key_name

_PLACES: tuple[tuple[str, tuple[Place, ...]], ...] = (
    ("Keys", ("composer", "app")),
    ("On a selected message (Alt+↑ Alt+↓)", ("message",)),
    ("In the list of conversations", ("sidebar",)),
)


class Dialog(ModalScreen[str | None]):
    """A box in the middle; Esc closes it."""

    DEFAULT_CSS = """
    Dialog { align: center middle; background: $background 70%; }
    Dialog .box {
        width: 88; max-width: 96%; height: auto; max-height: 92%; padding: 1 2;
        border: round $primary; background: $surface; scrollbar-size-vertical: 1;
    }
    Dialog .title { text-style: bold; padding-bottom: 1; height: auto; }
    Dialog .hint { color: $text-muted; padding-top: 1; }
    Dialog OptionList { height: auto; max-height: 16; }
    """


class Help(Dialog):
    """Everything the user can do, out of the registry of actions."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """`keys`: the user's own, by the action's name."""
        super().__init__()
        self._keys = keys

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="box") as box:
            box.can_focus = True
            for title, places in _PLACES:
                table = Table.grid(padding=(0, 2))
                for action in ACTIONS:
                    if action.place in places and (action.shown or action.place not in ("app", "composer")):
                        table.add_row(Text(self._shown(action), style="bold"), _with_command(action))
                yield Static(title, classes="title")
                yield Static(table)
                yield Static("")
            yield Static("Commands", classes="title")
            table = Table.grid(padding=(0, 2))
            for action in ACTIONS:
                if action.slash:
                    table.add_row(Text(f"/{action.slash} {action.takes}".strip(), style="bold"), Text(action.help))
            yield Static(table)
            yield Static("Esc closes this", classes="hint")

    def _shown(self, action: Action) -> str:
        return self._keys.get(key_name(action), action.shown)


def _with_command(action: Action) -> Text:
    text = Text(action.help)
    return text.append(f"   /{action.slash}", style="dim") if action.slash else text


class Ask(Dialog):
    """One line to type; gives it, or None."""

    def __init__(self, title: str, value: str = "") -> None:
        super().__init__()
        self._title, self._value = title, value

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(self._title, classes="title", markup=False)
            yield Input(self._value, select_on_focus=False)

    @on(Input.Submitted)
    def _done(self, event: Input.Submitted) -> None:
        self.dismiss(event.value)


class Form(ModalScreen[dict[str, str] | None]):
    """A line for each of several names; gives what was typed by name, or None."""

    DEFAULT_CSS = Dialog.DEFAULT_CSS.replace("Dialog", "Form")

    def __init__(self, title: str, names: Sequence[str]) -> None:
        super().__init__()
        self._title, self._names = title, names

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="box", can_focus=False):
            yield Static(self._title, classes="title", markup=False)
            for name in self._names:
                yield Static(name, markup=False)
                yield Input()
            yield Static("Enter goes on · Tab, Shift+Tab the next, the one before · Esc leaves", classes="hint")

    @on(Input.Submitted)
    def _done(self, event: Input.Submitted) -> None:
        fields = list(self.query(Input))
        if event.input is fields[-1]:
            self.dismiss({name: field.value for name, field in zip(self._names, fields, strict=True)})
        else:
            self.focus_next()


class Search(Dialog):
    """A list that what is typed narrows; gives the text chosen, or None."""

    def __init__(self, title: str, find: Callable[[str], Sequence[str]]) -> None:
        super().__init__()
        self._title, self._find = title, find
        self._found: Sequence[str] = ()

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(self._title, classes="title", markup=False)
            yield Input(placeholder="type to search")
            yield OptionList(markup=False)

    def on_mount(self) -> None:
        self._narrow("")

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        self._narrow(event.value)

    def _narrow(self, text: str) -> None:
        self._found = self._find(text)
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(
            [
                Option(Text(" ".join(visible(one[:300]).split()), no_wrap=True, overflow="ellipsis"))
                for one in self._found
            ]
        )
        options.highlighted = 0 if self._found else None

    def key_down(self) -> None:
        self.query_one(OptionList).action_cursor_down()

    def key_up(self) -> None:
        self.query_one(OptionList).action_cursor_up()

    @on(Input.Submitted)
    @on(OptionList.OptionSelected)
    def _done(self) -> None:
        chosen = self.query_one(OptionList).highlighted
        if chosen is not None:
            self.dismiss(self._found[chosen])


class Choose(Dialog):
    """One of several ways; gives its name, or None."""

    def __init__(self, title: str, ways: Mapping[str, str]) -> None:
        super().__init__()
        self._title, self._ways = title, ways

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(self._title, classes="title", markup=False)
            yield OptionList(*[Option(Text(shown), id=name) for name, shown in self._ways.items()], markup=False)
            yield Static("Enter takes one · Esc leaves it as it is", classes="hint")

    @on(OptionList.OptionSelected)
    def _done(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option_id)


class Figures(Dialog):
    """A table to read."""

    def __init__(self, title: str, table: Table) -> None:
        super().__init__()
        self._title, self._table = title, table

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="box") as box:
            box.can_focus = True
            yield Static(self._title, classes="title", markup=False)
            yield Static(self._table)
            yield Static("Esc closes this", classes="hint")
