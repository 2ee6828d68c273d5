"""The folder a conversion writes: nothing of it is seen under its name until it is whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m7mlx.errors import DiskError, InputError

_SPARE = 50_000_000  # bytes to leave free on the disk


def check_target(target: Path, source: Path, force: bool) -> None:
    """Raise InputError if `target` must not be written."""
    target, source = target.absolute(), source.absolute()
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder as --mlx-path")
    if target == source or source in target.parents or target in source.parents:
        raise InputError(f"{target} and the source {source} overlap; give another --mlx-path")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise InputError(f"{target} exists; give another --mlx-path, or --force to replace it")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} does not exist; create it, or give another --mlx-path")


def check_space(target: Path, nbytes: int) -> None:
    """Raise DiskError if the disk that will hold `target` has no room for `nbytes`."""
    free = shutil.disk_usage(target.absolute().parent).free
    if free < nbytes + _SPARE:
        raise DiskError(
            f"{target.absolute().parent} has {free / 1e9:.1f} GB free, but the result takes {nbytes / 1e9:.1f} GB"
        )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; it becomes `target` when the block ends without an error.

    On an error, Ctrl-C included, it is removed. What a killed process left is removed by the next run.
    """
    target = target.absolute()
    clean_up(target)
    work = target.parent / f".{target.name}.partial-{os.getpid()}"
    work.mkdir()
    try:
        yield work
        _replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def clean_up(target: Path) -> None:
    """Remove what dead processes left beside `target`, and put back what one had moved aside."""
    for path in target.parent.glob(f".{glob_escape(target.name)}.*-*"):
        match = re.fullmatch(r"\.(partial|old)-(\d+)", path.name.removeprefix("." + target.name))
        if match is None or _alive(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def glob_escape(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
