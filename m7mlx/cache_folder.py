"""A folder of saved conversations: found by how they begin, bounded, and their user's alone.

Each file is a saved cache (`m7mlx.cache_file`), bound to the weights that it was made with. What
was used least recently leaves once the folder is full. Several processes, and several models, may
share one folder: files appear whole, under names of their own, and one that has gone or is damaged
is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m7mlx.cache import RollingCache
from m7mlx.cache_file import SavedCache, hash_weights, load_cache, peek_cache, read_header, save_cache
from m7mlx.decode import goes_on, reusable, shared_start
from m7mlx.errors import CacheFileError, DiskError, NotFoundError
from m7mlx.model import Mistral

_SUFFIX, _PARTIAL = ".m7cache.safetensors", ".partial.safetensors"
_OLD = 3600.0  # seconds after which a file that was never finished is no other process's work


@dataclass(frozen=True)
class FolderFigures:
    """What a folder holds, of all models, and what one `CacheFolder` has done with it.

    hits     conversations that came back
    evicted  files that left because the folder was full
    damaged  files that could not be read, and were removed
    """

    files: int = 0
    nbytes: int = 0
    saved: int = 0
    hits: int = 0
    evicted: int = 0
    damaged: int = 0


class CacheFolder:
    """The conversations of one model in a folder. Its methods may be called on any thread.

    A conversation belongs to a space: one that is asked for in another is not found.
    """

    def __init__(self, folder: Path, model: Mistral, like: RollingCache, most_bytes: int) -> None:
        """Use `folder`, which is made if need be, and is its user's alone from now on.

        like        an empty cache with the options that all have (`Mistral.new_cache`)
        most_bytes  of all files in the folder

        It reads all weights once; on another thread than the model's, they must have been evaluated
        before. Raises DiskError.
        """
        self._folder, self._model, self._most_bytes = folder, model, most_bytes
        self._settings = like.settings
        self._weight_hash = hash_weights(model)
        self._kind = _kind(self._weight_hash, like)
        self._lock = threading.Lock()
        self._known: dict[str, SavedCache] = {}  # by the names of their files
        self._saved = self._hits = self._evicted = self._damaged = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise DiskError(f"{folder} cannot be used: {error.strerror}") from None
        self._remove_unfinished()

    @property
    def figures(self) -> FolderFigures:
        """What the folder holds now, and what has been done."""
        return FolderFigures(*measure_folder(self._folder), self._saved, self._hits, self._evicted, self._damaged)

    def find(self, ids: Sequence[int], space: str = "") -> tuple[int, str]:
        """Find the conversation of which most can be used for a prompt; nothing is loaded.

        Returns how many of the prompt's tokens it holds, and its name for `load`; 0 and "" if there
        is none.
        """
        best, found = 0, ""
        with self._lock:
            for name, saved in self._own(space).items():
                known = reusable(shared_start(saved.ids, ids), len(saved.ids), saved.max_rollback, len(ids))
                if known > best:
                    best, found = known, name
        return best, found

    def load(self, name: str) -> RollingCache | None:
        """Load a conversation that was found; None if it has gone or was damaged."""
        path = self._folder / name
        try:
            cache = load_cache(path, self._model, weight_hash=self._weight_hash)
        except (NotFoundError, OSError):
            return None
        except CacheFileError:
            with self._lock:
                self._damaged += 1
                self._remove(name)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        self._hits += 1
        return cache

    def save(self, cache: RollingCache, space: str = "", *, alone: bool = False) -> bool:
        """Save a conversation in the place of those that it goes on from; return whether it was.

        alone  in the place of all others of its space

        One that is too large is not, nor one that a saved one goes on from. Nothing may write into
        `cache` meanwhile; one with other options is not saved. Raises DiskError.
        """
        if cache.settings != self._settings or cache.nbytes > self._most_bytes:
            return False
        with self._lock:
            for name, saved in self._own(space).items():
                if goes_on(cache.ids, saved.ids, saved.max_rollback):
                    with contextlib.suppress(OSError):
                        os.utime(self._folder / name)
                    return False
        name = f"{self._kind}-{secrets.token_hex(8)}{_SUFFIX}"
        path = self._folder / name
        save_cache(path, cache, self._model, {"space": space}, weight_hash=self._weight_hash)
        with contextlib.suppress(OSError):  # another process may have removed it
            path.chmod(0o600)
        with self._lock:
            self._saved += 1
            for older, saved in self._own(space).items():
                if older != name and (alone or goes_on(saved.ids, cache.ids, cache.max_rollback)):
                    self._remove(older)
            self._evict()
        return True

    # --- the files; under the lock ----------------------------------------------------------------

    def _own(self, space: str) -> dict[str, SavedCache]:
        """This model's conversations of a space, by name. Each file is looked at once."""
        names = {name for name, _, _ in _files(self._folder) if name.startswith(f"{self._kind}-")}
        self._known = {name: saved for name, saved in self._known.items() if name in names}
        for name in sorted(names - self._known.keys()):
            try:
                self._known[name] = peek_cache(self._folder / name, self._model, weight_hash=self._weight_hash)
            except (NotFoundError, OSError):
                continue
            except CacheFileError:
                self._damaged += 1
                self._remove(name)
        return {name: saved for name, saved in self._known.items() if saved.metadata.get("space") == space}

    def _evict(self) -> None:
        """Remove what was used least recently until all that is left fits."""
        files = sorted(_files(self._folder), key=lambda file: file[2])
        size = sum(nbytes for _, nbytes, _ in files)
        for name, nbytes, _ in files:
            if size <= self._most_bytes:
                return
            self._remove(name)
            self._evicted += 1
            size -= nbytes

    def _remove(self, name: str) -> None:
        self._known.pop(name, None)
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def _remove_unfinished(self) -> None:
        """Remove what processes that were killed have left."""
        late = time.time() - _OLD
        for path in self._folder.glob(f".*{_SUFFIX}{_PARTIAL}"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < late:
                    path.unlink()


def find_spaces(folder: Path) -> dict[str, str]:
    """Find the spaces of a folder's conversations, of all models, by the names of their files."""
    found = {}
    for name, _, _ in _files(folder):
        with contextlib.suppress(NotFoundError, CacheFileError, OSError):
            found[name] = read_header(folder / name).metadata.get("space", "")
    return found


def remove_space(folder: Path, space: str) -> None:
    """Remove all conversations of a space, whichever model they were held with."""
    for name, found in find_spaces(folder).items():
        if found == space:
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def measure_folder(folder: Path) -> tuple[int, int]:
    """Count the conversations in a folder, of all models, and their bytes."""
    sizes = [size for _, size, _ in _files(folder)]
    return len(sizes), sum(sizes)


def _files(folder: Path) -> list[tuple[str, int, float]]:
    """Name, size and time of last use of all files, of all models."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(_SUFFIX) and not entry.name.startswith("."):
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    found.append((entry.name, status.st_size, status.st_mtime))
    return found


def _kind(weight_hash: str, like: RollingCache) -> str:
    """How the names of files begin that these weights can use, with these options."""
    config = like.config.to_dict()
    options = (weight_hash, config, like.window, like.n_sinks, like.slack, like.format)
    return hashlib.sha256(repr(options).encode()).hexdigest()[:16]
