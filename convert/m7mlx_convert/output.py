"""The folder a conversion writes: it is not there under its name until it is whole."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m7mlx.errors import DiskError, InputError
from m7mlx.files.checksums import MANIFEST
from m7mlx.files.disk import sync_path, why
from m7mlx.files.weights import INDEX
from m7mlx.terminal import shown
from m7mlx.units import in_gigabytes
from m7mlx_convert.folder import COPIED
from m7mlx_convert.writer import JOURNAL

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_SPARE = 50_000_000  # bytes to leave free on the disk


def check_target(target: Path, source: Path | None, force: bool) -> None:
    """Raise InputError if `target` must not be written; first undo what a killed run left there."""
    if not target.parent.is_dir():
        raise InputError(f"the folder {target.parent} does not exist; create it, or give another --mlx-path")
    restore(target)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder as --mlx-path")
    if source:
        check_apart(target, source)
    if not target.exists():
        return
    entries = sorted(target.iterdir())
    if entries and not force:
        raise InputError(f"{target} exists; give another --mlx-path, or --force to replace it")
    if entries and not (target / MANIFEST).is_file():
        raise InputError(
            f"{target} is not a model folder that m7mlx-convert wrote and is not replaced; give another --mlx-path"
        )
    if foreign := [entry.name for entry in entries if not _is_ours(entry)]:
        raise InputError(
            f"{target} holds {shown(foreign[0])}, which m7mlx-convert did not write, and is not replaced; move that "
            "away, or give another --mlx-path"
        )
    _try_to_replace(target)


def _is_ours(entry: Path) -> bool:
    """Return whether a conversion writes files of this name, or macOS's Finder its notes."""
    written = entry.name in (*COPIED, "config.json", "README.md", MANIFEST, INDEX, ".DS_Store")
    return not entry.is_symlink() and entry.is_file() and (written or _WEIGHTS.fullmatch(entry.name) is not None)


def _try_to_replace(target: Path) -> None:
    """Raise InputError, before all the work, if the system will not let a folder be moved."""
    aside = _aside(target)
    with _uninterrupted():
        try:
            target.rename(aside)
            aside.rename(target)
        except OSError as error:
            where = "a disk is mounted there" if error.errno == errno.EBUSY or os.path.ismount(target) else why(error)
            raise InputError(
                f"{target} cannot be replaced ({where}); give a folder in it: {target / 'model'}"
            ) from None


def _aside(target: Path) -> Path:
    """Return where a folder waits while another takes its place."""
    return target.parent / f".{target.name}.old-{os.getpid()}"


def check_apart(target: Path, source: Path) -> None:
    """Raise InputError if one of the two lies inside the other, or is the other."""
    source = source.resolve()
    target_line, source_line = [target, *target.parents], [source, *source.parents]
    if any(_same(source, path) for path in target_line) or any(_same(target, path) for path in source_line):
        raise InputError(f"{target} and the source {source} overlap; give another --mlx-path")


def _same(a: Path, b: Path) -> bool:
    """Return whether two paths are one file or folder, by whatever spelling."""
    return a == b or (a.exists() and b.exists() and a.samefile(b))


def check_space(target: Path, nbytes: int) -> None:
    """Raise DiskError if the disk that will hold `target` has no room for `nbytes`.

    What a killed run left counts as room: it is used or removed.
    """
    left = [file for folder in _left_by_the_dead(target, "partial") for file in folder.iterdir()]
    free = shutil.disk_usage(target.parent).free + sum(file.stat().st_size for file in left)
    if free < nbytes + _SPARE:
        raise DiskError(
            f"{target.parent} has {in_gigabytes(free)} free, but the result takes {in_gigabytes(nbytes)}; "
            "make room, or give another --mlx-path"
        )


@contextmanager
def whole_folder(target: Path, key: str | None = None) -> Iterator[Path]:
    """Make a folder beside `target` to write into; it becomes `target` when the block ends.

    On an error, Ctrl-C included, it is removed. What a killed process left is removed too, or used
    where its journal has the same `key`.
    """
    work = target.parent / f".{target.name}.partial-{os.getpid()}"
    _adopt(target, work, key)
    work.mkdir(exist_ok=True)
    try:
        yield work
        _sync(work)
        with _uninterrupted():
            _replace(work, target)
        sync_path(target.parent)
    except BaseException:
        with _uninterrupted():
            shutil.rmtree(work, ignore_errors=True)
        raise


def restore(target: Path) -> None:
    """Put back what a dead process had moved aside to replace it, or finish removing it."""
    for path in _left_by_the_dead(target, "old"):
        if target.exists():
            _remove(path, target)
        else:
            path.rename(target)


def _adopt(target: Path, work: Path, key: str | None) -> None:
    """Use what a killed run with the same key left as `work`; remove what others left."""
    for path in _left_by_the_dead(target, "partial"):
        if key and not work.exists() and _journal_key(path) == key:
            try:
                path.rename(work)  # of two processes that want it, one gets it
            except OSError:
                continue
            for file in work.iterdir():
                if file.name != JOURNAL and file.suffix != ".safetensors":
                    file.unlink()  # written anew, from what is in the source now
        else:
            shutil.rmtree(path, ignore_errors=True)


def _journal_key(folder: Path) -> str:
    try:
        with (folder / JOURNAL).open() as file:
            return file.readline().rstrip("\n")
    except (OSError, ValueError):
        return ""


def _left_by_the_dead(target: Path, kind: str) -> list[Path]:
    """Find the folders beside `target` of processes that are no more."""
    found = []
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.{kind}-*")):
        match = re.fullmatch(rf"\.{kind}-(\d{{1,9}})", path.name.removeprefix("." + target.name))
        if match and not _alive(int(match[1])):
            found.append(path)
    return found


def _sync(folder: Path) -> None:
    """Have the disk hold all of a folder, so that a power cut does not leave half of it."""
    for path in (*folder.iterdir(), folder):
        sync_path(path)


def _replace(work: Path, target: Path) -> None:
    """Put `work` in the place of `target`; the old one is deleted only when the new one stands."""
    old = _aside(target)
    if target.exists():
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _remove(old, target)


def _remove(old: Path, target: Path) -> None:
    """Delete a replaced folder; what somebody else put into it moves into the new one."""
    with contextlib.suppress(OSError):
        for entry in old.iterdir():
            if _is_ours(entry):
                entry.unlink()
            elif not (target / entry.name).exists():
                entry.rename(target / entry.name)
        old.rmdir()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # they are the main thread's business
        return
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for came_number in came:
            signal.raise_signal(came_number)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
