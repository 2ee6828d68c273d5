"""Loading a tokenizer: from a model folder, with its chat format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from m7mlx.errors import TokenizerError
from m7mlx.jsonfile import read_bytes, token_ids
from m7mlx.tokens.added_tokens import optional_json, read_names, tokenizer_errors
from m7mlx.tokens.choice import Folder, make_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tokens.tokenizer_sentencepiece import stated_version

_MOST_TEMPLATE = 1 << 20  # bytes


def load_tokenizer(folder: Path, embedding_size: int | None = None) -> Tokenizer:
    """Load the tokenizer of a model folder; `tokenizer.chat` is its chat format.

    embedding_size  number of rows of the model's embedding

    Raises TokenizerError, also where tokens that the model needs have no row in its embedding.
    """
    templates = _chat_templates(folder)
    names = read_names(folder, templates.values(), embedding_size)
    json_file, tekken = (_file(folder / name) for name in ("tokenizer.json", "tekken.json"))
    found = Folder(folder, _sentencepiece_file(folder), json_file, tekken, names, templates)
    if not (found.model or found.json or found.tekken):
        raise TokenizerError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or tekken.json)")
    tokenizer = make_tokenizer(found)
    tokenizer.eos_ids |= _eos_ids(folder)
    if embedding_size is not None:
        try:
            tokenizer.limit(embedding_size)
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}") from None
    return tokenizer


def _file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _sentencepiece_file(folder: Path) -> Path | None:
    """Return the sentencepiece model of the newest version; one that states none comes last."""
    named = {path: stated_version(path.name) for path in folder.glob("tokenizer.model.*") if path.is_file()}
    newest = max(
        (path for path in named if named[path]), key=lambda path: int((named[path] or "v0")[1:]), default=None
    )
    return newest or _file(folder / "tokenizer.model")


def _eos_ids(folder: Path) -> frozenset[int]:
    """Return the end ids that config.json and generation_config.json name."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        with tokenizer_errors(folder / name):
            found |= set(token_ids(optional_json(folder / name).get("eos_token_id"), "eos_token_id"))
    return frozenset(found)


def _chat_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates by name: chat_template.jinja, or those in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        with tokenizer_errors(path):
            return {"default": read_bytes(path, _MOST_TEMPLATE).decode("utf-8")}
    found = optional_json(folder / "tokenizer_config.json").get("chat_template")
    if found is None:
        return {}
    if isinstance(found, list) and all(isinstance(t, Mapping) and isinstance(t.get("name"), str) for t in found):
        found = {t["name"]: t.get("template") for t in found}
    templates = found if isinstance(found, dict) else {"default": found}
    if not all(isinstance(text, str) for text in templates.values()):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor texts with names"
        )
    return templates
