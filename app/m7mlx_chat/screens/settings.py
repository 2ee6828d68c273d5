"""The drawer: every setting with what it does, presets, and where they are kept."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.events import DescendantBlur
from textual.message import Message
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input, Select, Static, TextArea

from m7mlx.errors import InputError
from m7mlx.terminal import visible
from m7mlx_chat.focus import give_focus
from m7mlx_chat.settings import ANSWER, ENGINE, FIELDS, Settings


class SettingsDrawer(ModalScreen[None]):
    """The settings of the conversation: changes count at once; a preset keeps them under a name."""

    DEFAULT_CSS = """
    SettingsDrawer { align: right top; background: $background 40%; }
    SettingsDrawer .box {
        width: 58; max-width: 100%; height: 100%; padding: 1 2; background: $surface; border-left: outer $primary;
    }
    SettingsDrawer .fields { height: 1fr; scrollbar-size-vertical: 1; }
    SettingsDrawer .title { text-style: bold; }
    SettingsDrawer .row { height: 1; margin-top: 1; }
    SettingsDrawer .name { width: 20; }
    SettingsDrawer Input { width: 1fr; background: $boost; }
    SettingsDrawer TextArea {
        width: 1fr; height: auto; max-height: 5; background: $boost; border: none; padding: 0;
    }
    SettingsDrawer TextArea:focus { border: none; }
    SettingsDrawer .row.-long { height: auto; }
    SettingsDrawer .help { color: $text-muted; height: auto; }
    SettingsDrawer .told { color: $text-error; height: auto; max-height: 3; }
    """

    class Changed(Message):
        """The user has changed the settings."""

        def __init__(self, settings: Settings) -> None:
            super().__init__()
            self.settings = settings

    class Preset(Message):
        """The user takes a preset, or keeps the settings of now as one."""

        def __init__(self, name: str, keep: bool) -> None:
            super().__init__()
            self.name, self.keep = name, keep

    def __init__(self, settings: Settings, presets: list[str], path: Path) -> None:
        super().__init__()
        self._settings, self._presets, self._path = settings, presets, path

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static("Settings of this conversation", classes="title")
            yield Static("", classes="told", markup=False)  # in sight, whatever is scrolled
            yield from self._fields()

    def _fields(self) -> ComposeResult:
        with VerticalScroll(classes="fields", can_focus=False):
            if self._presets:
                names = [(Text(visible(name)), name) for name in self._presets]  # no markup
                yield Select(names, prompt="take a preset", id="preset")
            for name in ANSWER:
                yield from self._field(name)
            yield Static("")
            yield Static("How the engine keeps the conversation", classes="title")
            for name in ENGINE:
                yield from self._field(name)
            yield Static("")
            yield Static("Keep these settings as a preset", classes="title")
            yield Input(placeholder="its name", id="keep", compact=True)
            yield Static(f"in {visible(str(self._path))}", classes="help", markup=False)

    def _field(self, name: str) -> ComposeResult:
        is_long = name == "system"
        with Horizontal(classes="row -long" if is_long else "row"):
            yield Static(name, classes="name")
            if is_long:
                yield TextArea(self._settings.shown(name), id=f"field-{name}", compact=True)
            else:
                yield Input(self._settings.shown(name), id=f"field-{name}", compact=True)
        yield Static(FIELDS[name].help, classes="help", markup=False)

    def on_mount(self) -> None:
        give_focus(self.query_one("#field-system"))

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        if event.input.id != "keep":
            self._enter(event.input)
        elif event.value.strip():
            self.post_message(self.Preset(event.value.strip(), keep=True))

    @on(DescendantBlur)
    def _left(self, event: DescendantBlur) -> None:
        self._enter(event.widget)

    def _enter(self, field: Widget | None) -> bool:
        """Take what a field holds; False if it cannot be, which is told."""
        kind, _, name = ((field.id if field else "") or "").partition("-")
        if kind != "field":
            return True
        text = field.text if isinstance(field, TextArea) else field.value if isinstance(field, Input) else ""
        if text.strip() == self._settings.shown(name).strip():
            return True
        told = self.query_one(".told", Static)
        try:
            self._settings = self._settings.parsed(name, text)
        except InputError as error:
            told.update(f"{error}: it stays as it was")
            self._fill(name)
            return False
        told.update("")
        self._fill(name)
        self.post_message(self.Changed(self._settings))
        return True

    def _fill(self, name: str) -> None:
        field = self.query_one(f"#field-{name}")
        if isinstance(field, TextArea):
            field.load_text(self._settings.shown(name))
        elif isinstance(field, Input):
            field.value = self._settings.shown(name)

    def close(self) -> None:
        """Take the field that is being filled in, and leave; stay if it cannot be taken."""
        if self._enter(self.focused):
            self.dismiss(None)

    @on(Select.Changed, "#preset")
    def _take(self, event: Select.Changed) -> None:
        if isinstance(event.value, str):
            self.post_message(self.Preset(event.value, keep=False))

    def show(self, settings: Settings) -> None:
        """Show other settings: those of a preset."""
        self._settings = settings
        for name in (*ANSWER, *ENGINE):
            self._fill(name)
