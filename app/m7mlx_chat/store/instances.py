"""The running copies of the program: each holds a lock on a file of its own while it lives.

The kernel gives the lock back when a process ends, however it ends. So a name whose file can be
locked, or is gone, is dead. Process ids would not do: they are used again.

Register and ask only under the store's opening lock: between the making of a file and its locking
it looks dead.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path


class Instance:
    """This copy of the program; `name` is its own for ever."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.name = uuid.uuid4().hex
        self._path = folder / f"{self.name}.lock"
        self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._file)


def living(folder: Path) -> set[str]:
    """The names of all that live; the files of the dead are removed."""
    return {path.stem for path in folder.glob("*.lock") if _lives(path)}


def _lives(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # it has just ended
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        path.unlink(missing_ok=True)
        return False
    finally:
        os.close(file)
