"""Names of models → folders: a path, an alias, a Hub repository, a GGUF file, the demo model."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from m7mlx.errors import NotFoundError, WeightsError
from m7mlx.files.converter import converted, find_converted
from m7mlx.files.demo import fetch_demo, find_demo
from m7mlx.files.published import PUBLISHED
from m7mlx.files.repository import HubOutage, Layout, Progress, fetch_gguf, fetch_snapshot, find_gguf, find_snapshot
from m7mlx.files.weights import folder_weights, refuse_adapter
from m7mlx.jsonfile import said
from m7mlx.paths import user_path

# huggingface_hub is imported where it is used: 0.4 s, which models on this machine do not need.
ALIASES = {alias: model.repo for alias, model in PUBLISHED.items()}
DEMO = "demo"
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REPO_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([^\0]+\.gguf)", re.IGNORECASE)


def resolve(
    name: str | Path,
    revision: str | None = None,
    layout: Layout = "huggingface",
    progress: Progress | None = None,
) -> Path:
    """Return the folder that a name stands for; fetch what is not here, with progress on stderr.

    name      a path that exists, "demo", an alias, a Hub repository "org/name", or a GGUF file in
              one, "org/name/file.gguf"; a GGUF file is converted once, into the cache folder
              (`m7mlx.files.converter`)
    layout    "any" gives a GGUF file itself, and takes weights in Mistral's own layout: for the
              converter; "adapter" takes a LoRA adapter, which is refused otherwise
    progress  called with (bytes here, bytes in all) of a repository's large files, then of the
              conversion

    Raises NotFoundError, WeightsError, DownloadError, DiskError.
    """
    text = str(name)
    if (path := find_existing(name)) is not None:
        if layout != "adapter":
            refuse_adapter(path)
        return converted(path, progress) if layout == "huggingface" and path.is_file() else path
    if text == DEMO:
        return fetch_demo()
    repo = ALIASES.get(text, text)
    file = _repo_file(text)
    if file is not None:
        path = fetch_gguf(*file, revision, progress)
        return converted(path, progress) if layout == "huggingface" else path
    if not _is_repo(text):
        known = ", ".join([DEMO, *ALIASES])
        raise NotFoundError(f"{said(text)} is no folder here, no Hub repository (org/name) and no alias ({known})")
    return fetch_snapshot(repo, revision, layout, progress=progress)


def check_name(name: str) -> None:
    """Raise NotFoundError for a name that is nothing here and cannot be a repository either."""
    if find_existing(name) is None and name != DEMO and not _is_repo(name) and _repo_file(name) is None:
        resolve(name)


def _is_repo(name: str) -> bool:
    return not name.startswith(("/", ".", "~")) and is_repo_id(ALIASES.get(name, name))


def _repo_file(name: str) -> tuple[str, str] | None:
    """Split "org/name/file.gguf" into the repository and the file; None for any other name."""
    match = None if name.startswith(("/", ".", "~")) else _REPO_FILE.fullmatch(name)
    return (match[1], match[2]) if match and is_repo_id(match[1]) else None


def is_gguf(name: str) -> bool:
    """Whether a name has the form "org/name/file.gguf", of a file in a repository of the Hub."""
    return _repo_file(name) is not None


def find_local(name: str | Path) -> Path | None:
    """Return the folder that a name stands for if all of it is on this machine.

    For a file that exists and is no GGUF file that has been converted, return the file.
    """
    text = str(name)
    try:
        if (path := find_existing(name)) is not None:
            return (find_converted(path) or path) if path.is_file() else path
    except NotFoundError:
        return None
    if text == DEMO:
        return find_demo()
    if (file := _repo_file(text)) is not None:
        path = find_gguf(*file)
        return find_converted(path) if path is not None else None
    if not _is_repo(text):
        return None
    try:
        folder = find_snapshot(ALIASES.get(text, text), None, HubOutage(""))
        folder_weights(folder)
        return folder if (folder / "config.json").is_file() else None
    except (HubOutage, WeightsError, OSError, ValueError):  # what lies in a cache may be anything
        return None


def is_repo_id(text: str) -> bool:
    """Whether a text has the form "org/name" and keeps the Hub's rules for names."""
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    if not _REPO_ID.fullmatch(text):
        return False
    try:
        validate_repo_id(text)
    except errors.HFValidationError:
        return False
    return True


def find_existing(name: str | Path) -> Path | None:
    """Return the file or folder of this name, if there is one.

    Raises NotFoundError where the system does not let us look.
    """
    try:
        path = user_path(name)
        return path if str(name) and path.exists() else None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM):
            raise NotFoundError(f"{said(str(name))} may not be read: {os.strerror(errno.EACCES)}") from None
        return None  # too long for a path, or no path at all
