"""From a name to a `Source`: what the user calls a model, where it lies, who reads it."""

from __future__ import annotations

from pathlib import Path

from m7mlx.errors import InputError
from m7mlx.files.hub import ALIASES, DEMO, find_existing, resolve
from m7mlx.paths import user_path
from m7mlx_convert.adapter import merge_adapter
from m7mlx_convert.folder import open_folder
from m7mlx_convert.gguf import open_gguf
from m7mlx_convert.source import Source


def find_repo(source: str) -> str | None:
    """Return the Hub repository that `source` names, if it names one or a file in one."""
    if find_existing(source) or source == DEMO:
        return None
    return "/".join(ALIASES.get(source, source).split("/")[:2])


def name_model(source: str) -> str:
    """Return the model's name: the last part of a repository or path, without a file's suffix."""
    local = find_existing(source)
    if local and local.is_dir():
        return local.resolve().name
    last = ALIASES.get(source, source).rpartition("/")[2]
    return Path(last).stem if last.lower().endswith(".gguf") or local else last


def name_target(source: str, mlx_path: str | Path | None, label: str) -> Path:
    """Return where the result goes: `mlx_path`, or a folder named after the model and `label`."""
    return user_path(mlx_path or f"{name_model(source)}-{label or 'mlx'}")


def resolve_source(source: str, revision: str | None) -> Path:
    """Return the source's folder or GGUF file, which is downloaded if it is not here.

    Raises NotFoundError, DownloadError, InputError.
    """
    if revision and not find_repo(source):
        raise InputError(f"--revision is for Hub repositories; {source} is here already")
    return resolve(source, revision, "any")


def open_model(path: Path, source: str, adapter: str | None) -> Source:
    """Open what lies at `path`, which the user calls `source`, and merge the adapter into it.

    Raises ConfigError, WeightsError, TokenizerError; InputError for an adapter that does not fit.
    """
    opened = open_gguf(path) if path.is_file() else open_folder(path, name_model(source))
    return merge_adapter(opened, resolve(adapter, layout="adapter")) if adapter else opened
