"""The folder a conversion writes: nothing of it is seen under its name until it is whole."""

from __future__ import annotations

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

_SPARE = 50_000_000  # bytes to leave free on the disk


def check_target(target: Path, source: Path, force: bool) -> None:
    """Raise InputError if `target` must not be written. Undoes first what a killed run left there."""
    if not target.parent.is_dir():
        raise InputError(f"the folder {target.parent} does not exist; create it, or give another --mlx-path")
    clean_up(target)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder as --mlx-path")
    check_apart(target, source)
    if not target.exists():
        return
    entries = list(target.iterdir())
    if entries and not force:
        raise InputError(f"{target} exists; give another --mlx-path, or --force to replace it")
    if entries and not ((target / "config.json").is_file() and all(entry.is_file() for entry in entries)):
        raise InputError(f"{target} is not a model folder and is not replaced; give another --mlx-path")


def check_apart(target: Path, source: Path) -> None:
    """Raise InputError if one of the two lies inside the other, or is the other."""
    source = source.resolve()
    target_line, source_line = [target, *target.parents], [source, *source.parents]
    if any(_same(source, path) for path in target_line) or any(_same(target, path) for path in source_line):
        raise InputError(f"{target} and the source {source} overlap; give another --mlx-path")


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one file or folder, by whatever spelling."""
    return a == b or (a.exists() and b.exists() and a.samefile(b))


def check_space(target: Path, nbytes: int) -> None:
    """Raise DiskError if the disk that will hold `target` has no room for `nbytes`."""
    free = shutil.disk_usage(target.parent).free
    if free < nbytes + _SPARE:
        raise DiskError(
            f"{target.parent} has {free / 1e9:.1f} GB free, but the result takes {nbytes / 1e9:.1f} GB; "
            "make room, or give another --mlx-path"
        )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; it becomes `target` when the block ends without an error.

    On an error, Ctrl-C included, it is removed. What a killed process left is removed by the next run.
    """
    work = target.parent / f".{target.name}.partial-{os.getpid()}"
    work.mkdir()
    try:
        yield work
        _sync(work)
        with _uninterrupted():
            _replace(work, target)
    except BaseException:
        with _uninterrupted():
            shutil.rmtree(work, ignore_errors=True)
        raise


def clean_up(target: Path) -> None:
    """Remove what dead processes left beside `target`, and put back what one had moved aside."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*-*"):
        match = re.fullmatch(r"\.(partial|old)-(\d{1,9})", path.name.removeprefix("." + target.name))
        if match is None or _alive(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have the disk hold all of a folder, so that after a power cut the name does not stand for half of it."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(work: Path, target: Path) -> None:
    """Put `work` in the place of `target`; the old one is deleted only when the new one stands."""
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if target.exists():
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
