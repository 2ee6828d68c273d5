"""Choosing and loading a model."""

from __future__ import annotations

from pathlib import Path

from m7mlx.terminal import visible
from m7mlx_chat.catalog import on_this_machine
from m7mlx_chat.events import Failed
from m7mlx_chat.screens.model_work import Chosen
from m7mlx_chat.screens.models import Models
from m7mlx_chat.settings import Settings
from m7mlx_chat.view import ChatView, Parts


class ModelCommands(ChatView):
    """The model that answers, and the user's choice of another."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.folder: Path | None = None  # of the model that was chosen
        self.failure: Failed | None = None  # why there is no model
        self._working: Settings | None = None  # those that the engine was last set up with

    def action_model(self, argument: str = "") -> None:
        self.choose_model(argument)

    def choose_model(self, name: str = "") -> None:
        """Let the user choose; a name is taken at once, if it can be."""
        if isinstance(self.screen, Models):
            return
        used = dict.fromkeys(c.model for c in self.store.conversations(limit=200) if c.model)
        title = "Which model?" if self.session.ready is None and not self.is_loading else "Models"
        if self.failure is not None:
            title = f"✗ {visible(self.failure.message)}\n\n{title}"
        current = self.session.settings.model if self.session.ready is not None else ""
        screen = Models(
            self.environment.models,
            current,
            list(used),
            title,
            name or None,
            programs=self.environment.programs,
            loaded=self.folders_in_use(),
        )
        self.push_screen(screen, self.model_chosen)

    def folders_in_use(self) -> list[Path]:
        """Return the folders of the model that answers, and of the one that drafts for it."""
        found = [self.folder, on_this_machine(self.session.settings.speculate)]
        is_used = self.session.ready is not None or self.is_loading
        return [folder for folder in found if folder is not None] if is_used else []

    async def model_chosen(self, chosen: Chosen | None) -> None:
        """Load what was chosen, if anything was."""
        if chosen is not None:
            self.folder = chosen.folder
            self.session.configure(self.session.settings.changed({"model": chosen.name}))
            self.load_model()

    def load_model(self) -> None:
        """Have the engine load the model with the settings of now."""
        if self.folder is not None:
            self.session.ready, self.is_loading = None, True
            self.engine.load(self.folder, self.session.settings)
            self.show_title()
            self.show_state()
            self.show_gauge()

    def model_is_ready(self) -> None:
        """Take note that the engine has loaded the model."""
        self.is_loading, self.failure = False, None
        self._working = self.session.settings

    def model_failed(self, failed: Failed, was_loading: bool) -> None:
        """Let the user choose another model, or go back to the settings that still work."""
        if failed.fatal:
            self.failure = failed
            self.choose_model()
        elif was_loading and self._working is not None:
            self.session.configure(self.session.settings.with_engine_of(self._working))
