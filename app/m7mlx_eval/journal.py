"""Answers as they come, in a file: a run that was killed resumes where it stood.

Each is a line of JSON, behind a header that says what they belong to. A line that a kill cut short
is dropped. The file's name holds a hash of the header, so that another model's answers are neither
taken nor overwritten.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlx.utils import tree_flatten

from m7mlx.arrays import fingerprint
from m7mlx.errors import DiskError, InputError
from m7mlx.files.disk import why
from m7mlx.files.hub import resolve
from m7mlx.model import Mistral
from m7mlx.paths import user_path

_FORMAT = "m7mlx-eval answers 1"


class Journal:
    """Answers by key, kept in a folder; a context manager that closes the file."""

    def __init__(self, folder: Path, binding: Mapping[str, Any]) -> None:
        """Open the file of these bindings, or begin it. Raises InputError if it is damaged."""
        header = {"format": _FORMAT, **binding}
        folder = user_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"answers-{_digest(header)[:16]}.jsonl"
        self.answers: dict[str, Any] = {}
        end = self._read(header)
        self._file = self.path.open("ab")
        self._file.truncate(end)
        if not end:
            self._write(header)

    def _read(self, header: Mapping[str, Any]) -> int:
        """Take the answers that are there; return where the last whole line ends."""
        end = 0
        if not self.path.exists():
            return end
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    if end:
                        self.answers[entry["key"]] = entry["answer"]
                    elif entry != header:
                        raise ValueError
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise InputError(
                        f"{self.path} is damaged; delete it, and all its answers are made anew"
                    ) from None
                end += len(line)
        return end

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer: once this returns, a kill does not lose it."""
        self.answers[key] = answer
        self._write({"key": key, "answer": answer})

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise DiskError(f"{self.path} cannot be written: {why(error)}; the answers so far are kept") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what could not be written was said
            self._file.close()


def find_binding(name: str, model: Mistral, **options: Any) -> dict[str, Any]:
    """Return what answers depend on: configuration, weights, tokenizer and options."""
    folder, digest = resolve(name), hashlib.sha256()
    for path in sorted([*folder.glob("token*"), *folder.glob("chat_template*")]):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return {
        "config": _digest(model.config.to_dict()),
        "weights": fingerprint(dict(tree_flatten(model.parameters()))),
        "tokenizer": digest.hexdigest(),
        "m7mlx": version("m7mlx"),
        **options,
    }


def key_of(kind: str, arguments: Any, repeat: int) -> str:
    """Name a request by what is asked, and how often it was asked before."""
    return _digest([kind, arguments, repeat])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
