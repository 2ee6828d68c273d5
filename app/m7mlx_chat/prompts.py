"""The user's own prompts: text files in the folder `prompts` beside config.toml.

A prompt may have variables: in "Translate {{text}} to {{language}}" there are two, which are asked
for when it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx.files.disk import write_whole
from m7mlx_chat.files import read_text
from m7mlx_chat.session import Session

_VARIABLE = re.compile(r"\{\{\s*(\w[\w -]*?)\s*\}\}")
_NAME = re.compile(r"\w[\w .-]{0,59}")
_SUFFIX = ".md"


class Prompts:
    """All prompts in a folder, which need not be there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """The names of all prompts, in order."""
        try:
            found = [path.stem for path in self.folder.iterdir() if path.suffix == _SUFFIX]
        except OSError:
            return []
        return sorted(name for name in found if _NAME.fullmatch(name))

    def read(self, name: str) -> str:
        """A prompt's text. Raises InputError if there is none, or none that can be read."""
        if name not in self.names():
            there = ", ".join(self.names()) or "none yet; /prompt save NAME keeps the last question as one"
            raise InputError(f"there is no prompt {name!r} in {self.folder}; there are: {there}")
        return read_text(self.folder / f"{name}{_SUFFIX}").strip("\n")

    def save(self, name: str, text: str) -> Path:
        """Keep a text as a prompt; returns its file. Raises InputError if there is one already."""
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r} cannot be a prompt's name: use letters, digits, spaces, '.', '-', '_'")
        path = self.folder / f"{name}{_SUFFIX}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, text + "\n", new=True)
        except FileExistsError:
            raise InputError(f"there is a prompt {name!r} already: {path}") from None
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror})") from None
        return path


def kept_question(prompts: Prompts, session: Session, name: str) -> Path:
    """Keep the last question as a prompt; returns its file. Raises InputError."""
    if not name:
        raise InputError("/prompt save needs a name for it")
    question = session.last_question
    if question is None:
        raise InputError("nothing has been asked yet that could be kept")
    return prompts.save(name, question.text)


def variables(text: str) -> list[str]:
    """The names of a prompt's variables, each once, in order."""
    return list(dict.fromkeys(_VARIABLE.findall(text)))


def filled(text: str, values: Mapping[str, str]) -> str:
    """A prompt with its variables replaced; those without a value stay."""
    return _VARIABLE.sub(lambda match: values.get(match[1], match[0]), text)
