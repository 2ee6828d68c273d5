"""Running the converter from the core, which does not import it: in a process of its own.

This is the one step back from the core to what is built on it. A process also gives its memory
back.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from m7mlx.errors import ConfigError, DiskError, M7Error, RunError, WeightsError
from m7mlx.files.disk import why
from m7mlx.files.repository import Progress
from m7mlx.paths import cache_dir
from m7mlx.terminal import one_line

_MAGIC = b"GGUF"
_LAST = 4000  # bytes of stderr in which a reason for a converter's failure is looked for


def converted(file: Path, progress: Progress | None = None) -> Path:
    """Return the model folder of a GGUF file, which is converted once into the cache folder.

    When the file changes it is converted again, and the earlier result is removed. Other processes
    that want the same wait. `progress` is called with (bytes done, bytes in all); without it they
    are shown on stderr. Raises ConfigError for a file that is not GGUF; WeightsError, RunError,
    DiskError.
    """
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(_MAGIC))
        status = file.stat()
        folder, place = _result(file, status)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {why(error)}") from None
    if magic != _MAGIC:
        raise ConfigError(f"{file} is a file, but not GGUF; give a model's folder")
    if not is_whole(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.parent / f"{place}.lock") as lock:
                if not is_whole(folder):  # no other process has converted it meanwhile
                    _remove_others(folder, place)
                    print(f"Converting {file}, once, into {folder} …", file=sys.stderr)
                    run_converter(file.resolve(), folder, lock, progress)
        except OSError as error:
            raise DiskError(f"{folder} cannot be written: {why(error)}") from None
    return folder


def find_converted(file: Path) -> Path | None:
    """Return the model folder of a GGUF file if it has been converted in its present state."""
    try:
        folder = _result(file, file.stat())[0]
        return folder if is_whole(folder) else None
    except OSError:
        return None


def _result(file: Path, status: os.stat_result) -> tuple[Path, str]:
    """Return the folder for a GGUF file in this state, and what stands in its name for the place.

    The Hub's cache holds each revision in a folder of its own: all of them are one place, so that
    the result of an earlier revision is removed.
    """
    path = os.fspath(file.parent.resolve() / file.name)
    place = _hash(re.sub(r"(/models--[^/]+)/snapshots/[^/]+/", r"\1/", path))
    state = _hash(f"{status.st_size} {status.st_mtime_ns} {version('m7mlx')}")
    stem = re.sub(r"[^\w.-]+", "-", file.stem)[:60].strip("-.") or "model"
    return cache_dir() / "gguf" / f"{stem}-{place}-{state}", place


def run_converter(source: Path, target: Path, lock: int, progress: Progress | None = None) -> None:
    """Convert `source` into the folder `target`, in a process that holds `lock` until it ends.

    What is left of a folder there, which has lost some of its files, is removed.
    If this process is killed, the converter ends when it next reports progress; the next run
    resumes its work. Raises WeightsError for a source that cannot be converted, RunError for a
    failure on the way.
    """
    if target.exists():
        shutil.rmtree(target)
    command = [sys.executable, "-P", "-m", "m7mlx_convert", str(source), "--mlx-path", str(target), "--json"]
    message = ""
    with tempfile.TemporaryFile() as errors:
        converter = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, pass_fds=(lock,), text=True
        )
        assert converter.stdout is not None
        try:
            with contextlib.closing(converter.stdout) as events:
                for line in events:
                    message = _show_event(line, progress) or message
            status = converter.wait()
        finally:
            converter.terminate()  # as Ctrl-C: it cleans up
            converter.wait()
        if status == 0:
            return
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - _LAST))
        said = errors.read().decode("utf-8", "replace").strip().splitlines()
    kind: type[M7Error] = WeightsError if status == 2 else RunError
    reason = message or (said[-1] if said else f"its converter ended with status {status}")
    raise kind(f"{source} could not be converted: {reason}")


def _show_event(line: str, progress: Progress | None) -> str:
    """Show an event of the converter: progress or a note; return its message if it is an error."""
    try:
        event = json.loads(line)
    except ValueError:
        return ""
    if event.get("event") == "progress" and progress is not None:
        progress(event["done"], event["total"])
    elif event.get("event") == "progress" and sys.stderr.isatty():
        done, total = event["done"], max(event["total"], 1)
        end = "\n" if done >= total else ""
        print(f"\r{event['task']}: {done / total:.0%}", end=end, file=sys.stderr, flush=True)
    elif event.get("event") == "note":
        print(f"note: {one_line(str(event.get('text', '')))}", file=sys.stderr, flush=True)
    return str(event.get("message", "")) if event.get("event") == "error" else ""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Wait for the lock of this file and hold it; gives the file's descriptor.

    A process that inherits the descriptor holds the lock too, even if this one is killed.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def is_whole(folder: Path) -> bool:
    """Whether a folder of the converter is here, and has not lost its config or its weights since.

    It appears whole or not at all, but what tidies caches may remove single files.
    """
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _remove_others(folder: Path, place: str) -> None:
    """Remove results of earlier states of the same file, and what killed runs have left of them."""
    for other in folder.parent.glob(f"*-{place}-*"):
        if folder.name not in other.name:
            shutil.rmtree(other, ignore_errors=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
