"""The models on this machine and those worth fetching: size, bits, window, need of memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m7mlx.config import ModelConfig
from m7mlx.errors import M7Error
from m7mlx.files.demo import find_demo
from m7mlx.files.hub import ALIASES, DEMO, find_local
from m7mlx.files.published import PUBLISHED, Published
from m7mlx.files.weights import folder_weights, is_left_out, parameters
from m7mlx.memory import UNDO_SLACK, budget, cache_bytes, footprints, planned_length

Fit = Literal["fits", "tight", "too big"]
_TIGHT = 0.7  # of the machine's memory: beyond it, other programs have to make room


@dataclass(frozen=True)
class Entry:
    """A model that can be chosen.

    name    what `--model` takes
    folder  where it lies; None: to be fetched
    nbytes  bytes of weights, or of the download
    memory  bytes that a chat takes, at the window or at 4,096 tokens
    problem why it cannot be used
    label   what the picker calls it, where that is not its name
    file    a GGUF file, which has to be converted before it is used
    owner   the program that keeps it, where that is another one
    """

    name: str
    folder: Path | None
    nbytes: int
    memory: int = 0
    bits: str = ""
    window: int | None = None
    context: int = 0
    about: str = ""
    problem: str = ""
    label: str = ""
    file: Path | None = None
    owner: str = ""

    @property
    def fit(self) -> Fit:
        share = self.memory / budget()
        return "fits" if share <= _TIGHT else "tight" if share <= 1 else "too big"


# Bytes that the demo model takes, and what it is.
_DEMO = Entry(
    DEMO, None, 93_000_000, 400_000_000, "4 bits", None, 8192, "SmolLM2-135M-Instruct: small, quick, simple"
)


def _suggest(alias: str, model: Published) -> Entry:
    """Describe a model that may be fetched, with the memory of a chat at 4,096 tokens."""
    config = model.config
    return Entry(
        alias,
        None,
        model.nbytes,
        memory=model.weights + cache_bytes(config, planned_length(config)),
        bits="4 bits",
        window=config.window,
        context=config.max_position_embeddings,
        about=f"{model.repo.rpartition('/')[2].removesuffix('-4bit')}: {', '.join(model.can) or 'no tools'}",
    )


# What is worth fetching, the smallest first; of two aliases for one model the first.
SUGGESTED = tuple(
    sorted(
        [_DEMO, *(_suggest(a, m) for a, m in PUBLISHED.items() if a not in ("mistral-v0.3", "mistral-v0.2"))],
        key=lambda entry: entry.nbytes,
    )
)


def models(others: Sequence[str] = (), own: Path | None = None) -> list[Entry]:
    """Every model here, then what may be fetched and fits, then what cannot be used.

    The demo model comes first, then the folders in `own`, where the chat puts what it converts, the
    Hub's cache, and those of `others` (names used before) that are folders elsewhere.
    """
    found: dict[Path, Entry] = {}
    for name, folder in _folders(others, own):
        real = Path(os.path.realpath(folder))
        if real not in found:
            found[real] = describe(name, folder)
    known = {entry.name for entry in found.values()}
    missing = [entry for entry in SUGGESTED if entry.name not in known and ALIASES.get(entry.name) not in known]
    missing = [entry for entry in missing if entry.fit != "too big" or entry.name == "mistral"]
    return sorted([*found.values(), *missing], key=lambda entry: bool(entry.problem))


def on_this_machine(name: str, own: Path | None = None) -> Path | None:
    """Return where a model lies that can be used at once; None also for what cannot be a name.

    A name may come from anywhere: an imported conversation, a folder in the Hub's cache. Of the
    models in `own` the folder's name will do, as it is shown.
    """
    try:
        found = find_local(full_name(name, own))
        return found if found is not None and (found.is_dir() or found.is_file()) else None
    except (M7Error, OSError, ValueError):
        return None


def shown_name(entry: Entry, own: Path | None) -> str:
    """The name of a model in lists: of one in `own` the folder's, which `full_name` takes."""
    if entry.folder is not None and entry.folder.parent == own:
        return entry.folder.name
    return entry.label or entry.name


def full_name(name: str, own: Path | None) -> str:
    """The name that stands for a model everywhere: of one in `own` its path, else the name."""
    with suppress(OSError, ValueError):  # too long for a file, or none at all
        if own is not None and name == Path(name).name and (own / name / "config.json").is_file():
            return str(own / name)
    return name


def short_name(name: str) -> str:
    """A model's name for a line: of a path its last part."""
    return Path(name).name or name if name.startswith(("/", "~")) else name


def describe(name: str, folder: Path) -> Entry:
    """A model folder, from its config and the headers of its weights."""
    try:
        config = ModelConfig.from_folder(folder)
        stored = folder_weights(folder)
        parameters(folder, config, stored)
        nbytes = sum(tensor.nbytes for name, tensor in stored.items() if not is_left_out(name, config))
        memory = footprints(config, nbytes, UNDO_SLACK)[0].total
    except Exception as error:  # whatever it holds, the others are shown
        return Entry(name, folder, 0, problem=" ".join(str(error).split()) or type(error).__name__)
    return Entry(
        name,
        folder,
        nbytes,
        memory=memory,
        bits=_bits(config, nbytes),
        window=config.window,
        context=config.max_position_embeddings,
        about=", ".join(PUBLISHED[name].can) if name in PUBLISHED else "",
    )


def _bits(config: ModelConfig, nbytes: int) -> str:
    if config.quantization is not None:
        mixed = any(config.quantization.overrides.values())
        base = (
            f"{config.quantization.bits} bits" if config.quantization.mode == "affine" else config.quantization.mode
        )
        return base + (" mixed" if mixed else "")
    return f"{round(8 * nbytes / config.n_weights)} bits"


def _folders(others: Sequence[str], own: Path | None) -> Iterator[tuple[str, Path]]:
    """Names and folders; the first name of a folder counts."""
    if demo := find_demo():
        yield DEMO, demo
    for config in sorted(own.glob("*/config.json") if own else ()):
        yield str(config.parent), config.parent
    yield from _in_hub_cache()
    for name in others:
        path = Path(os.path.expanduser(name))
        with suppress(OSError, ValueError):  # no path, or one that may not be read
            if (path / "config.json").is_file():
                yield name, path


def _in_hub_cache() -> Iterator[tuple[str, Path]]:
    """Repositories whose main revision is here whole, of a kind that the chat can load."""
    from huggingface_hub import constants  # 0.1 s, which a start without the picker saves

    shorter = {repo: alias for alias, repo in reversed(ALIASES.items())}
    for storage in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        repo = storage.name.removeprefix("models--").replace("--", "/", 1)
        folder = on_this_machine(repo)
        if folder is None:
            continue
        try:
            ModelConfig.from_folder(folder)
        except Exception:
            continue  # another architecture: none of our business
        yield shorter.get(repo, repo), folder
