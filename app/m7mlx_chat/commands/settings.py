"""Settings of the conversation, presets, the system prompt, the theme."""

from __future__ import annotations

from dataclasses import replace

from textual import on

from m7mlx.errors import InputError
from m7mlx_chat.commands.models import ModelCommands
from m7mlx_chat.config import read_config, save, save_preset
from m7mlx_chat.screens.settings import SettingsDrawer
from m7mlx_chat.settings import FIELDS, Settings


class SettingsCommands(ModelCommands):
    """How answers are made. What concerns the engine has it load the model anew."""

    def action_settings(self, argument: str = "") -> None:
        """Open the drawer; or show or change one setting by name."""
        if argument:
            name, _, value = argument.partition(" ")
            if value:
                self.configure(self.session.settings.parsed(name, value))
            elif name not in FIELDS:
                raise InputError(f"there is no setting {name!r}; there are {', '.join(FIELDS)}")
            self.tell(f"{name}: {self.session.settings.shown(name)}")
        else:
            presets = sorted(self.config.presets)
            self.push_screen(SettingsDrawer(self.session.settings, presets, self.config.path))

    def action_system(self, argument: str = "") -> None:
        if argument:
            self.configure(self.session.settings.parsed("system", "" if argument == "off" else argument))
        system = self.session.settings.system
        self.tell(f"system prompt: {system}" if system else "there is no system prompt; /system TEXT sets one")

    def action_preset(self, argument: str = "") -> None:
        if not argument:
            names = ", ".join(sorted(self.config.presets)) or "there is none yet; F2 keeps one"
            raise InputError(f"name a preset: {names}")
        self.configure(self.session.settings.changed(self.config.preset(argument)))
        self.tell(f"settings of {argument}")

    def configure(self, settings: Settings) -> None:
        """Take other settings; where they concern the engine, it is set up anew."""
        before = self.session.settings
        self.session.configure(replace(settings, model=before.model))
        if settings.model != before.model:
            self.choose_model(settings.model)  # which takes it, if it is one
        elif not settings.sets_engine_up_as(before):
            self.load_model()

    @on(SettingsDrawer.Changed)
    def _settings_changed(self, event: SettingsDrawer.Changed) -> None:
        self.configure(event.settings)

    @on(SettingsDrawer.Preset)
    def _preset_named(self, event: SettingsDrawer.Preset) -> None:
        if event.keep:
            values = self.session.settings.given(FIELDS)
            values.pop("model", None)
            save_preset(self.config.path, event.name, values)
            self.config = read_config(self.config.path)
            self.tell(f"kept as {event.name}: /preset {event.name}, or --preset {event.name}")
        else:
            self.configure(self.session.settings.changed(self.config.preset(event.name)))
            if isinstance(self.screen, SettingsDrawer):
                self.screen.show(self.session.settings)

    def keep_theme(self, theme: str) -> None:
        """Keep the colours that the user has chosen: by the command, in the palette."""
        if theme != self.config.theme:
            save(self.config.path, {"theme": theme})
            self.config = replace(self.config, theme=theme)

    def action_theme(self, argument: str = "") -> None:
        if not argument:
            self.search_themes()
        elif argument in self.available_themes:
            self.theme = argument
        else:
            raise InputError(f"there is no theme {argument!r}; there are {', '.join(sorted(self.available_themes))}")
