"""What a folder's files say of tokens besides the vocabulary: their names, their roles, whether they are shown.

tokenizer_config.json (`added_tokens_decoder`, `eos_token` …), special_tokens_map.json and added_tokens.json are read
as transformers reads them; where they contradict each other, the one counts that counts there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from m7mlx.errors import ConfigError, TokenizerError
from m7mlx.jsonfile import given, read_json, said

# Words, with or without spaces around them. Any other added token stands for something else than its text.
_WORDS = re.compile(r"[\s▁]*[^\W_]+(?:[\s▁'’.-]+[^\W_]+)*[\s▁]*")
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how vocabularies write a byte
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


class AddedToken(NamedTuple):
    """A token that is matched whole: by name, in tokenizer.json's words."""

    name: str
    special: bool = False  # not shown where an answer is
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # … behind it
    single_word: bool = False
    normalized: bool = False
    id: int | None = None  # where the file says one

    def flags(self) -> dict[str, bool]:
        return {flag: getattr(self, flag) for flag in FLAGS}


@dataclass(frozen=True)
class Names:
    """What the files name.

    settings  tokenizer_config.json, with special_tokens_map.json where that counts
    added     added tokens, in the order of their ids; then tokens that have a role
    lists     further ones, called special where nothing else is said of them
    texts     the chat templates: an added token that one of them writes is no word of a text
    rows      of the model's embedding, where known
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()
    lists: tuple[AddedToken, ...] = ()
    texts: tuple[str, ...] = ()
    rows: int | None = None

    def role(self, key: str) -> str | None:
        """The name of the token for "bos_token", "eos_token" …, if there is one."""
        return _content(self.settings.get(key))

    def all(self, own: Iterable[AddedToken]) -> dict[str, AddedToken]:
        """All added tokens by name, those of the vocabulary's file first.

        The last flags and the first id count, and what was called special once stays so.
        """
        found: dict[str, AddedToken] = {}
        for token in (*own, *self.added):
            before = found.get(token.name, token)
            special = token.special or before.special
            found[token.name] = token._replace(special=special, id=token.id if before.id is None else before.id)
        return found | {token.name: token for token in self.lists if token.name not in found}

    def is_control(self, token: AddedToken) -> bool:
        """Whether text must never become this token.

        So it is for all added tokens but words and white space, which stand for themselves, and for single
        characters and bytes, without which some texts could not be written.
        """
        if len(token.name) == 1 or BYTE.fullmatch(token.name):
            return False
        if token.special:
            return True
        if not token.name.strip(" \t\r\n▁"):
            return False
        return _WORDS.fullmatch(token.name) is None or any(token.name in text for text in self.texts)

    def has_row(self, token_id: int) -> bool:
        """Whether the model knows the token."""
        return self.rows is None or token_id < self.rows


def read_names(folder: Path, texts: Iterable[str] = (), rows: int | None = None) -> Names:
    """The tokens that a folder's files name. Raises ConfigError and TokenizerError for files that say nonsense."""
    settings = _settings(folder / "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:  # a newer file, and complete: the others do not count
        added = _of_decoder(folder, decoder)
        roles, lists = _roles(settings)
        return Names(settings, (*added, *roles), lists, tuple(texts), rows)
    settings |= optional_json(folder / "special_tokens_map.json")
    roles, lists = _roles(settings)
    ids = optional_json(folder / "added_tokens.json")
    if not all(type(i) is int and name for name, i in ids.items()):
        raise TokenizerError(f"{folder / 'added_tokens.json'} does not give each token an id")
    special = {token.name for token in (*roles, *lists)}
    added = [AddedToken(name, special=name in special, id=i) for name, i in sorted(ids.items(), key=lambda e: e[1])]
    return Names(settings, (*added, *roles), lists, tuple(texts), rows)


def _of_decoder(folder: Path, decoder: Any) -> list[AddedToken]:
    try:
        entries = sorted((int(i), token) for i, token in decoder.items())
        return [AddedToken(str(token["content"]), **_flags(token), id=i) for i, token in entries if token["content"]]
    except (AttributeError, KeyError, TypeError, ValueError):
        path = folder / "tokenizer_config.json"
        raise TokenizerError(f"{path}: added_tokens_decoder does not say which token each id is") from None


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {flag: bool(token.get(flag, False)) for flag in FLAGS}


def _roles(settings: Mapping[str, Any]) -> tuple[tuple[AddedToken, ...], tuple[AddedToken, ...]]:
    """The tokens that the settings give a role, and those that they list."""
    roles = [value for key, value in settings.items() if key.endswith("_token")]
    lists: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key)
        if isinstance(value, Mapping):
            roles += value.values()
        elif isinstance(value, list):
            lists += value
    return tuple(_special(roles)), tuple(_special(lists))


def _special(values: Iterable[Any]) -> Iterable[AddedToken]:
    for value in values:
        if name := _content(value):
            flags = _flags(value) if isinstance(value, Mapping) else {}
            yield AddedToken(name, **{**flags, "special": True})


def _content(token: Any) -> str | None:
    name = token.get("content") if isinstance(token, Mapping) else token
    return name if isinstance(name, str) and name else None


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the fields that are used as they should be. Raises TokenizerError."""
    settings = optional_json(path)
    try:
        for field_name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = settings.get(field_name)
            if token is not None and not isinstance(token.get("content") if isinstance(token, dict) else token, str):
                raise ConfigError(
                    f"{field_name} must be a text, or an object with a text as content, not {said(token)}"
                )
        decoder = given(settings, "added_tokens_decoder", "an object") or {}
        if not all(isinstance(token, dict) for token in decoder.values()):
            raise ConfigError("added_tokens_decoder must hold objects by id")
        adds = settings.get("add_bos_token")
        if adds is not None and not isinstance(adds, bool):
            raise ConfigError(f"add_bos_token must be true or false, not {said(adds)}")
    except ConfigError as error:
        raise in_file(path, error) from None
    return settings


def in_file(path: Path, error: Exception) -> TokenizerError:
    """The same, with the file's name."""
    return TokenizerError(f"{error}" if str(path) in str(error) else f"{path}: {error}")


def optional_json(path: Path) -> dict[str, Any]:
    """An object in a file, or an empty one where there is no file. Raises TokenizerError."""
    try:
        return read_json(path) if path.is_file() else {}
    except ConfigError as error:
        raise in_file(path, error) from None
