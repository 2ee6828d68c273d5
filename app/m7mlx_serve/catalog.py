"""The models that can be asked for, by name: those that were given, and those in a folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m7mlx.config import ModelConfig
from m7mlx.errors import InputError
from m7mlx.memory import UNDO_SLACK, cache_bytes, default_kv_bits, loaded_bytes, planned_length
from m7mlx_serve.limits import Limits

_MOST = 1000  # models of a folder
_FRESH = 5.0  # seconds for which a look into the folder holds


@dataclass(frozen=True)
class About:
    """What a model is, as its files say.

    stored   bytes of its weights in files
    context  the most tokens of a conversation
    needed   bytes that it takes once loaded: weights, and the keys and values of as many
             conversations as are answered at a time, of its window, or of 4,096 tokens
    """

    stored: int
    context: int
    needed: int


class Catalog:
    """Names of models, and the folders where they lie."""

    def __init__(self, given: Mapping[str, Path], folder: Path | None = None) -> None:
        """List the models `given`, and whatever lies in `folder`. Raises InputError for none."""
        self._given, self._folder = dict(given), folder
        self._found: dict[str, Path] = {}
        self._looked = float("-inf")
        if not self.names:
            raise InputError(f"--models-dir {folder} holds no model: a folder with config.json and weights")

    @property
    def names(self) -> list[str]:
        """All names; the first is the one that a request without a name means."""
        return list(self._all())

    def folder(self, name: str) -> Path | None:
        """The folder of a model; None for a name that is not here."""
        return self._all().get(name)

    def _all(self) -> Mapping[str, Path]:
        if self._folder is not None and time.monotonic() - self._looked > _FRESH:
            self._found, self._looked = dict(_models_in(self._folder)), time.monotonic()
        return {**self._given, **{name: path for name, path in self._found.items() if name not in self._given}}


def about(folder: Path, limits: Limits) -> About:
    """What the model in a folder is. Raises InputError and the errors of a folder that is none."""
    config = ModelConfig.from_folder(folder)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    bound = config.window or limits.bound(config)
    positions = bound + UNDO_SLACK if bound else planned_length(config)
    keys = cache_bytes(config, positions, limits.kv_bits or default_kv_bits(config, stored))
    needed = loaded_bytes(config, stored) + limits.rows * keys
    return About(stored, config.max_position_embeddings, needed)


def _models_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Folders with a model, at most one folder deep: "name", "owner/name"."""
    count = 0
    for child in _folders(folder):
        inner: Sequence[tuple[str, Path]] = [(child.name, child)]
        if not _is_model(child):
            inner = [(f"{child.name}/{path.name}", path) for path in _folders(child) if _is_model(path)]
        for found in inner:
            if count == _MOST:
                return
            count += 1
            yield found


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
