"""What both faces of the chat are told on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m7mlx.errors import DownloadError
from m7mlx.hub import resolve
from m7mlx.sampling import Sampling


@dataclass(frozen=True)
class Settings:
    model: str
    system: str
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...] = ()

    def messages(self, history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation as the model sees it: the system prompt, then the history."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *history]

    def folder(self) -> Path:
        """The model's folder, fetched with progress on stderr where it is not here yet."""
        try:
            return resolve(self.model)
        except DownloadError as error:
            if self.model == "demo":
                raise
            raise DownloadError(f"{error}; or try the small model: m7mlx-chat --model demo") from None
