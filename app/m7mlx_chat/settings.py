"""What both faces of the chat are told on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m7mlx.cache import CacheOptions
from m7mlx.errors import DownloadError
from m7mlx.hub import resolve
from m7mlx.model import Mistral
from m7mlx.sampling import Sampling
from m7mlx.speculative import Drafter, PromptLookup, load_draft_model
from m7mlx.tokenizer import Tokenizer

_NO_MODEL = ("off", "lookup")


@dataclass(frozen=True)
class Settings:
    model: str
    system: str
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...] = ()
    cache: CacheOptions = field(default_factory=CacheOptions)
    speculate: str = "off"

    def messages(self, history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation as the model sees it: the system prompt, then the history."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *history]

    def folder(self) -> Path:
        """The model's folder, fetched with progress on stderr where it is not here yet; the draft model's too."""
        try:
            if self.speculate not in _NO_MODEL:
                resolve(self.speculate)
            return resolve(self.model)
        except DownloadError as error:
            if self.model == "demo":
                raise
            raise DownloadError(f"{error}; or try the small model: m7mlx-chat --model demo") from None

    def drafter(self, model: Mistral, tokenizer: Tokenizer) -> Drafter | None:
        """What --speculate asks for. Raises as `load_draft_model`."""
        if self.speculate == "off":
            return None
        return PromptLookup() if self.speculate == "lookup" else load_draft_model(self.speculate, model, tokenizer)
