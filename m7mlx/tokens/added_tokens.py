"""The tokens that a folder's files name beside the vocabulary: names, roles, which are shown.

tokenizer_config.json (`added_tokens_decoder`, `eos_token` …), special_tokens_map.json and
added_tokens.json are read as transformers reads them; where they contradict each other, the file
that transformers prefers wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from m7mlx.errors import ConfigError, TokenizerError
from m7mlx.jsonfile import given, read_json, said

# Words, with or without spaces around them. Any other added token stands for more than its text.
_WORDS = re.compile(r"[\s▁]*[^\W_]+(?:[\s▁'’.-]+[^\W_]+)*[\s▁]*")
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how vocabularies write a byte
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


class AddedToken(NamedTuple):
    """A token that is matched whole, described as tokenizer.json describes it.

    special         left out where an answer is shown
    lstrip, rstrip  takes the white space before it, after it
    id              None where the file names none
    """

    name: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    id: int | None = None

    def flags(self) -> dict[str, bool]:
        """Return all but the name and the id, as tokenizer.json writes them."""
        return {flag: getattr(self, flag) for flag in FLAGS}


@dataclass(frozen=True)
class Names:
    """The tokens that a folder's files name.

    settings  tokenizer_config.json, with special_tokens_map.json where that is read too
    added     added tokens, in the order of their ids; then tokens that have a role
    lists     further tokens, special unless another file says otherwise
    texts     the chat templates: an added token that one of them writes is never a plain word
    rows      number of rows of the model's embedding, where known
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()
    lists: tuple[AddedToken, ...] = ()
    texts: tuple[str, ...] = ()
    rows: int | None = None

    def role(self, key: str) -> str | None:
        """Return the name of the token for "bos_token", "eos_token" …, if there is one."""
        return _content(self.settings.get(key))

    def all(self, own: Iterable[AddedToken]) -> dict[str, AddedToken]:
        """Return all added tokens by name, those of the vocabulary's file (`own`) first.

        Where several files name a token, the last one's flags and the first one's id are taken; it
        is special if any of them says so.
        """
        found: dict[str, AddedToken] = {}
        for token in (*own, *self.added):
            before = found.get(token.name, token)
            special = token.special or before.special
            found[token.name] = token._replace(special=special, id=token.id if before.id is None else before.id)
        return found | {token.name: token for token in self.lists if token.name not in found}

    def is_control(self, token: AddedToken) -> bool:
        """Whether text must never become this token.

        That holds for every added token, except for words and white space, which mean no more than
        they say, and for single characters and bytes, without which some texts could not be
        written.
        """
        if len(token.name) == 1 or BYTE.fullmatch(token.name):
            return False
        if token.special:
            return True
        if not token.name.strip(" \t\r\n▁"):
            return False
        return _WORDS.fullmatch(token.name) is None or any(token.name in text for text in self.texts)

    def has_row(self, token_id: int) -> bool:
        """Whether the model's embedding has a row for the token."""
        return self.rows is None or token_id < self.rows


def read_names(folder: Path, texts: Iterable[str] = (), rows: int | None = None) -> Names:
    """Read the tokens that a folder's files name. Raises TokenizerError for a malformed file."""
    settings = _settings(folder / "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:  # a newer file, and complete: transformers reads no other
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
    """Return the tokens that the settings give a role, and those that they list."""
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
    """Read tokenizer_config.json and check the fields that are used. Raises TokenizerError."""
    settings = optional_json(path)
    with tokenizer_errors(path):
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
    return settings


@contextmanager
def tokenizer_errors(path: Path) -> Iterator[None]:
    """Turn a ConfigError, or text that is not UTF-8, into a TokenizerError that names the file."""
    try:
        yield
    except (ConfigError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{error}" if str(path) in str(error) else f"{path}: {error}") from None


def optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty where there is no file. Raises TokenizerError."""
    with tokenizer_errors(path):
        return read_json(path) if path.is_file() else {}
