"""Copies of caches on the disk: a conversation that is opened again goes on at once.

Each conversation has one copy, of the state it was left in, in fewer bits than it was held in
unless the settings say otherwise. A copy is made on the engine's thread and written on another, so
that nobody's tokens wait for a disk.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from m7mlx import Mistral, RollingCache
from m7mlx.cache_folder import CacheFolder, find_spaces, measure_folder, remove_space
from m7mlx.errors import InputError, M7Error
from m7mlx.memory import budget
from m7mlx_chat import ENGINE_THREAD
from m7mlx_chat.events import Event, Note, OnDisk
from m7mlx_chat.settings import Settings

LEAST = 256  # tokens that are worth a file, or reading one
_SPARED = 1_000_000_000  # bytes of the disk that are left to others


class DiskCopies:
    """The copies of one model's conversations, for the thread that owns the model.

    What goes wrong costs some reading the next time, no more: it is told, and nothing is raised.
    """

    def __init__(
        self,
        folder: Path,
        model: Mistral,
        cache: RollingCache,
        settings: Settings,
        emit: Callable[[Event], None],
    ) -> None:
        """Use `folder` for copies of conversations that are held in caches like `cache`."""
        self._path, self._model, self._emit = folder, model, emit
        self._most_bytes = int(settings.kv_disk * 1e9)
        self._like = _stored_like(cache, model, settings.kv_disk_bits)
        self._smaller = self._like.format.stored_bits(model.dtype) / cache.format.stored_bits(model.dtype)
        self._opening = threading.Lock()
        self._folder: CacheFolder | None = None
        self._writing: threading.Thread | None = None
        self._forgotten: set[str] = set()  # conversations that were deleted
        self._told = ""  # what went wrong last

    @property
    def figures(self) -> OnDisk:
        """What lies on the disk, of all models."""
        count, nbytes = measure_folder(self._path)
        return OnDisk(count, nbytes, self._most_bytes, frozenset(find_spaces(self._path).values()))

    def bring(self, ids: Sequence[int], space: str, held: int) -> RollingCache | None:
        """Bring back a conversation, where that saves some reading.

        ids    of the prompt, of whose start `held` are in memory
        space  the conversation
        """
        if len(ids) < held + LEAST or space not in find_spaces(self._path).values():
            return None
        try:
            folder = self._open()
            known, name = folder.find(ids, space)
            return folder.load(name) if known >= held + LEAST else None
        except (M7Error, RuntimeError) as error:  # MLX lacks memory, say
            self._tell(f"a conversation cannot be brought back from the disk, and is read anew: {error}")
            return None
        finally:
            self._emit(self.figures)

    def save(self, cache: RollingCache, space: str) -> bool:
        """Copy a conversation, and have the copy written; False if that must be tried again."""
        self._forgotten.discard(space)
        if len(cache.ids) < LEAST or len(cache.ids) != cache.offset or not cache.intact:
            return True
        if self._writing is not None and self._writing.is_alive():
            return False
        size = int(cache.nbytes * self._smaller)
        if not self._has_room(cache, size):
            return True
        copy = self._like.like()
        try:
            copy.take(cache, self._model.dtype)
            mx.eval(copy.arrays, self._model.parameters())  # what is still to be computed is this thread's
        except RuntimeError as error:
            self._tell(f"a conversation could not be copied to the disk: {error}")
            return True
        # By its name the command knows that it must not end in order while MLX is used.
        self._writing = threading.Thread(target=self._write, args=(copy, space), name=ENGINE_THREAD, daemon=True)
        self._writing.start()
        return True

    def forget(self, space: str) -> None:
        """Remove a conversation that was deleted. One that is answered again is kept again."""
        self._forgotten.add(space)
        remove_space(self._path, space)
        self._emit(self.figures)

    def close(self, seconds: float) -> None:
        """Wait so long for what is being written."""
        if self._writing is not None:
            self._writing.join(seconds)

    def _open(self) -> CacheFolder:
        with self._opening:
            if self._folder is None:  # only now: it reads all weights
                self._folder = CacheFolder(self._path, self._model, self._like, self._most_bytes)
            return self._folder

    def _has_room(self, cache: RollingCache, size: int) -> bool:
        """Whether disk and memory have room for a copy of `size` bytes."""
        if size > self._most_bytes:
            self._tell(
                f"this conversation takes {size / 1e9:.1f} GB, more than may lie on the disk, and will be read "
                f"anew when it is opened again; kv_disk (F2) is {self._most_bytes / 1e9:g} GB"
            )
            return False
        there = next(path for path in (self._path, *self._path.parents) if path.is_dir())
        try:
            free = shutil.disk_usage(there).free
        except OSError as error:
            self._tell(f"a conversation could not be copied to the disk: {error.strerror}")
            return False
        if free < size + _SPARED:
            self._tell(f"{there} has {free / 1e9:.1f} GB left: this conversation is not copied there")
            return False
        return self._model.nbytes + cache.nbytes + size < budget()

    def _write(self, copy: RollingCache, space: str) -> None:
        try:
            self._open().save(copy, space, alone=True)
            self._told = ""
        except Exception as error:
            self._tell(f"a conversation could not be copied to the disk: {error}")
        finally:
            if space in self._forgotten:
                remove_space(self._path, space)
            self._emit(self.figures)
            mx.clear_streams()  # left to the thread's own end, they may abort the process

    def _tell(self, message: str) -> None:
        """Tell what went wrong; not over and over."""
        if message != self._told:
            self._told = message
            self._emit(Note(message))


def _stored_like(cache: RollingCache, model: Mistral, bits: int) -> RollingCache:
    """An empty cache like another, but of `bits`, where those are fewer and fit its shape."""
    if bits >= cache.format.stored_bits(model.dtype):
        return cache.like()
    for group_size in (cache.format.group_size, 64, 32):
        try:
            like = RollingCache(
                cache.config,
                cache.slack,
                kv_bits=bits,
                kv_group_size=group_size,
                max_kv_size=cache.max_kv_size,
                sinks=cache.n_sinks,
            )
        except InputError:  # groups that do not divide head_dim
            continue
        like.owner = cache.owner
        return like
    return cache.like()
