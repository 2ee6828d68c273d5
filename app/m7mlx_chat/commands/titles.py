"""Titles by the model, once the user has been quiet for a while."""

from __future__ import annotations

import time

from textual import on

from m7mlx_chat.view import ChatView, Parts
from m7mlx_chat.widgets.composer import Composer

_QUIET_SECONDS = 4.0  # since the last answer, and since anything was typed


class TitleCommands(ChatView):
    """When the model may write a title."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._stirred = time.monotonic()  # when something was last done

    @on(Composer.Changed)
    def stir(self) -> None:
        """Take note that something has been done just now."""
        self._stirred = time.monotonic()

    def write_title_when_quiet(self) -> None:
        """Have the model write a title, if nothing has been done for a while."""
        is_quiet = time.monotonic() - self._stirred >= _QUIET_SECONDS
        if self.config.model_titles and is_quiet and self.state == "ready" and self.drafts.turns.first is None:
            self.session.write_title(self.session.settings.model)
