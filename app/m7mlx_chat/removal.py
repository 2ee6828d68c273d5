"""Deleting a model: what the chat has fetched or converted, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from m7mlx.errors import DiskError, InputError
from m7mlx.files.disk import why
from m7mlx.paths import cache_dir
from m7mlx_chat.catalog import Entry

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy

# huggingface_hub is imported where it is used: 0.4 s, which only who deletes has to wait for.


@dataclass(frozen=True)
class Removal:
    """What would be deleted.

    path       a folder of ours, or a repository in the Hub's cache
    nbytes     bytes on the disk that this frees
    is_shared  it lies in the Hub's cache, which other programs use, too
    """

    path: Path
    nbytes: int
    is_shared: bool


def find_removal(entry: Entry, own: Path, loaded: Collection[Path]) -> Removal:
    """Return what deleting a model would remove.

    own     the folder for models that are converted here
    loaded  folders of models that are in use

    Raises InputError for one that is in use, or that the chat has not put where it is.
    """
    folder = entry.folder
    if entry.owner:
        raise InputError(f"this is {entry.owner}'s; delete it there")
    if folder is None:
        raise InputError("this model is not on this machine")
    if os.path.realpath(folder) in {os.path.realpath(one) for one in loaded}:
        raise InputError("this model is in use; choose another one first")
    if folder.parent == own or folder == cache_dir() / "demo":
        return Removal(folder, _size(folder), is_shared=False)
    if (storage := _storage(folder)) is not None:
        return Removal(storage, _strategy(storage).expected_freed_size, is_shared=True)
    raise InputError(f"{folder} is a folder of your own, which the chat does not delete")


def remove(removal: Removal) -> int:
    """Delete a model; returns the bytes that this has freed. Raises DiskError."""
    path = removal.path
    try:
        if removal.is_shared:
            _strategy(path).execute()
        elif path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        raise DiskError(f"{path} could not be deleted: {why(error)}") from None
    if os.path.lexists(path):  # huggingface_hub only logs what it could not delete
        raise DiskError(f"{path} could not be deleted as a whole; look at its permissions")
    return removal.nbytes


def _size(folder: Path) -> int:
    """Return the bytes of the files in a folder; of a link to one, those of the link: none."""
    if folder.is_symlink():
        return 0
    files = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files if not file.is_symlink())


def _storage(folder: Path) -> Path | None:
    """Return the repository in the Hub's cache that a snapshot belongs to, if it is one."""
    from huggingface_hub import constants

    storage = Path(os.path.realpath(folder)).parent.parent
    is_here = storage.parent == Path(os.path.realpath(constants.HF_HUB_CACHE))
    return storage if is_here and folder.parent.name == "snapshots" and storage.name.startswith("models--") else None


def _strategy(storage: Path) -> DeleteCacheStrategy:
    """Plan the deletion of all revisions of a repository. Raises InputError where there is none."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cache = scan_cache_dir(storage.parent)
    except (CacheNotFound, ValueError):
        raise InputError(f"{storage.parent} is not there any more") from None
    # Of this repository alone: a copy of it has revisions of the same names.
    repos = frozenset(repo for repo in cache.repos if repo.repo_path == storage)
    revisions = [revision.commit_hash for repo in repos for revision in repo.revisions]
    if not revisions:
        raise InputError(f"{storage} is damaged; the chat does not know what it would delete")
    return replace(cache, repos=repos).delete_revisions(*revisions)
