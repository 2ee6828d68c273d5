"""The drawer: every setting with what it does, presets, and where they are kept."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Input, Select, Static

from m7mlx.errors import InputError
from m7mlx.terminal import visible
from m7mlx_chat.settings import ANSWER, ENGINE, FIELDS, Settings


class SettingsDrawer(ModalScreen[None]):
    """The settings of the conversation: changes count at once; a preset keeps them under a name."""

    DEFAULT_CSS = """
    SettingsDrawer { align: right top; background: $background 40%; }
    SettingsDrawer .box {
        width: 58; max-width: 100%; height: 100%; padding: 1 2; background: $surface; border-left: outer $primary;
        scrollbar-size-vertical: 1;
    }
    SettingsDrawer .title { text-style: bold; }
    SettingsDrawer .row { height: 1; margin-top: 1; }
    SettingsDrawer .name { width: 20; }
    SettingsDrawer Input { width: 1fr; background: $boost; }
    SettingsDrawer .help { color: $text-muted; height: auto; }
    SettingsDrawer .told { color: $text-error; height: auto; }
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
        with VerticalScroll(classes="box"):
            yield Static("Settings of this conversation", classes="title")
            yield Static("", classes="told", markup=False)
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
        with Horizontal(classes="row"):
            yield Static(name, classes="name")
            yield Input(self._settings.shown(name), id=f"field-{name}", compact=True)
        yield Static(FIELDS[name].help, classes="help", markup=False)

    @on(Input.Submitted)
    @on(Input.Blurred)
    def _entered(self, event: Input.Submitted | Input.Blurred) -> None:
        kind, _, name = (event.input.id or "").partition("-")
        if kind == "field":
            self._enter(name, event.input)
        elif isinstance(event, Input.Submitted) and event.value.strip():
            self.post_message(self.Preset(event.value.strip(), keep=True))

    def _enter(self, name: str, field: Input) -> None:
        told = self.query_one(".told", Static)
        if field.value.strip() == self._settings.shown(name).strip():
            return
        try:
            self._settings = self._settings.parsed(name, field.value)
        except InputError as error:
            told.update(str(error))
            field.value = self._settings.shown(name)
            return
        told.update("")
        field.value = self._settings.shown(name)
        self.post_message(self.Changed(self._settings))

    @on(Select.Changed, "#preset")
    def _take(self, event: Select.Changed) -> None:
        if isinstance(event.value, str):
            self.post_message(self.Preset(event.value, keep=False))

    def show(self, settings: Settings) -> None:
        """Show other settings: those of a preset."""
        self._settings = settings
        for name in (*ANSWER, *ENGINE):
            self.query_one(f"#field-{name}", Input).value = settings.shown(name)
