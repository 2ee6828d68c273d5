"""The choice of a tokenizer and a chat format: a folder's own template, or Mistral's format for it.

The template that comes with a model is the truth. Mistral's format, which also takes what templates
refuse (several questions in a row, a system prompt later on), replaces it only where nothing is
lost:

- the folder has no template, and Mistral's own vocabulary, whose version is certain;
- the template is one that Mistral published: those models were made with mistral-common;
- or both give the same ids, or both refuse, for each of a set of probing conversations.

The choice is remembered for each state of the files.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from m7mlx.errors import ChatFormatError, TokenizerError
from m7mlx.files.records import read_record, write_record
from m7mlx.jsonfile import said
from m7mlx.tokens.added_tokens import Names
from m7mlx.tokens.messages import ChatFormat, Message
from m7mlx.tokens.mistral_format import MistralFormat
from m7mlx.tokens.template_format import TemplateFormat
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tokens.tokenizer_json import JsonTokenizer
from m7mlx.tokens.tokenizer_sentencepiece import SentencePieceTokenizer
from m7mlx.tokens.tokenizer_tekken import TekkenTokenizer
from m7mlx.tokens.versions import VERSIONS, Version, number_of, possible_versions

# SHA-256 of the templates that Mistral published for 7B Instruct v0.1 to v0.3, of their lines
# without indentation.
_PUBLISHED = {
    "7e995b379ec01747807246483647cd99030abf331653f1119e16d7ac041a3495",  # v0.1 and v0.2, 2023
    "26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7",  # v0.2 and v0.3, 2024
    "36bf53d17d6269f064a8ace51f792a9a4ae2bc91486ce5df8de00002a28ee5bd",  # v0.1, v0.2: system prompt
    "8be58afa35e97d75e65e750f012bcd48260514fe7e24352fca0acb8b7247d111",  # v0.3, with tools
    "304ce9c2d9ed2c50062f05910735ae4832f782a0fb2d2560e8b0644ce44625a6",  # the same, later
}
_SIZES = {"v1": 32000, "v2": 32768, "v3": 32768}  # of the vocabularies that those go with
_RECORD = "chat-formats.json"
_RULES = 2  # counts up when the rules of the choice change
_KEPT = 200  # choices that are remembered
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "sum", "arguments": '{"a": [1, 2]}'}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "sum",
        "description": "Adds \u201cnumbers\u201d up.",
        "parameters": {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}}}},
    },
}


Kind = Literal["model", "json", "tekken"]


class Folder(NamedTuple):
    """A model folder, as far as the choice depends on it."""

    path: Path
    model: Path | None  # sentencepiece's
    json: Path | None
    tekken: Path | None
    names: Names
    templates: Mapping[str, str]

    def kinds(self) -> list[Kind]:
        """Return the kinds of file that there are; what the first one holds counts."""
        paths: dict[Kind, Path | None] = {"json": self.json, "tekken": self.tekken, "model": self.model}
        return [kind for kind, path in paths.items() if path is not None]


class _Choice(NamedTuple):
    kind: Kind
    version: Version | None  # of Mistral's format; None: the folder's own template


def make_tokenizer(folder: Folder) -> Tokenizer:
    """Load a folder's tokenizer and give it its chat format. Raises TokenizerError."""
    state = _state(folder)
    choice = _remembered(state)
    if choice is None or choice.kind not in folder.kinds():
        choice = _choose(folder)
        _remember(state, choice)
    tokenizer = _read(folder, choice.kind)
    versions = [choice.version] if choice.version else possible_versions(tokenizer)
    tokenizer.names_calls = bool(versions) and number_of(versions[0]) >= 11
    if choice.version:
        tokenizer.chat = _mistral_format(tokenizer, choice.version)
    else:
        tokenizer.chat = TemplateFormat(tokenizer, folder.templates, folder.names.settings)
    return tokenizer


def _read(folder: Folder, kind: Kind) -> Tokenizer:
    path = {"model": folder.model, "json": folder.json, "tekken": folder.tekken}[kind]
    assert path is not None
    if kind == "tekken":
        return TekkenTokenizer(path)
    return SentencePieceTokenizer(path, folder.names) if kind == "model" else JsonTokenizer(path, folder.names)


def _mistral_format(tokenizer: Tokenizer, version: Version) -> MistralFormat:
    settings = tokenizer.settings if isinstance(tokenizer, TekkenTokenizer) else None
    return MistralFormat(tokenizer, version, settings)


def _choose(folder: Folder) -> _Choice:
    first, *others = folder.kinds()
    own = mistrals = _read(folder, first)
    kind = first
    for other in others:
        try:
            beside = _read(folder, other)
            if isinstance(own, JsonTokenizer) and beside.vocabulary() == own.vocabulary():
                kind, mistrals = other, beside  # Mistral's own files give the very ids of mistral-common
                break
        except TokenizerError:  # a damaged file, which is not needed
            pass
    version = _version(folder, own, mistrals)
    return _Choice(kind, version) if version else _Choice(first, None)


def _version(folder: Folder, own: Tokenizer, mistrals: Tokenizer) -> Version | None:
    """Return the version of Mistral's format that a folder's model reads, None for its template."""
    possible = possible_versions(mistrals)
    if mistrals.stated_version is not None and not possible:
        warnings.warn(
            f"{folder.path} states version {said(mistrals.stated_version)} of Mistral's format, which is not known "
            f"here, or lacks its tokens; the model's own chat template is used",
            stacklevel=2,
        )
    if not folder.templates:
        return possible[0] if len(possible) == 1 and _is_whole(mistrals, possible[0]) else None
    return next((version for version in possible if _is_mistrals(folder, own, mistrals, version)), None)


def _is_whole(mistrals: Tokenizer, version: Version) -> bool:
    return version != "v1" or mistrals.vocab_size == _SIZES[version]


def _is_mistrals(folder: Folder, own: Tokenizer, mistrals: Tokenizer, version: Version) -> bool:
    template = folder.templates.get("default")
    if template is None:
        return False
    if _digest(template) in _PUBLISHED and mistrals.vocab_size == _SIZES.get(version):
        return True
    theirs = TemplateFormat(own, folder.templates, folder.names.settings)
    ours = _mistral_format(mistrals, version)
    knows_tools = any("tool" in text for text in folder.templates.values())
    # A template cannot read the JSON of a tool's result: it is not asked to, where the file that
    # states the version has said already what becomes of it.
    result = '{"sum": 3}' if mistrals.stated_version is None else "three"
    return all(_ids(ours, *probe) == _ids(theirs, *probe) for probe in _probes(knows_tools, result))


def _ids(chat: ChatFormat, messages: list[Message], tools: list[Any]) -> list[int] | None:
    try:
        return chat.encode(messages, tools)
    except (ChatFormatError, TokenizerError):
        return None


def _probes(knows_tools: bool, tool_result: str) -> list[tuple[list[Message], list[Any]]]:
    """Return conversations of all kinds, with tools where the template knows them."""
    system: Message = {"role": "system", "content": "Be brief, in two\nlines."}
    hello: Message = {"role": "user", "content": "Hello, you"}
    bye: Message = {"role": "user", "content": "1 + 2?"}
    answer: Message = {"role": "assistant", "content": "Hi there."}
    call: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    result: Message = {"role": "tool", "tool_call_id": _CALL["id"], "name": "sum", "content": tool_result}
    plain: list[list[Message]] = [[hello], [hello, answer, bye], [system, hello], [system, hello, answer, bye]]
    probes: list[tuple[list[Message], list[Any]]] = [(messages, []) for messages in plain]
    if knows_tools:
        with_tools: list[list[Message]] = [[bye], [system, hello, answer, bye], [bye, call, result]]
        probes += [(messages, [_TOOL]) for messages in [*with_tools, [bye, call, result, answer, hello]]]
    return probes


def _digest(template: str) -> str:
    lines = (line.strip() for line in template.replace("\\n", "\n").splitlines())
    return hashlib.sha256("\n".join(line for line in lines if line).encode("utf-8", "replace")).hexdigest()


# --- what is remembered ---------------------------------------------------------------------------


def _state(folder: Folder) -> str:
    """Return a digest of the files, of the rules here and of this project's version."""
    try:
        ours = version_of("m7mlx")
    except PackageNotFoundError:
        ours = ""
    told = hashlib.sha256(f"{_RULES} {ours} {folder.names.rows}".encode())
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    for path in (folder.model, folder.json, folder.tekken, *(folder.path / name for name in names)):
        data = path.read_bytes() if path and path.is_file() else b""
        told.update(f"{path.name if path else None} {len(data)} ".encode() + data)
    told.update(json.dumps(dict(folder.templates)).encode())
    return told.hexdigest()


def _remembered(state: str) -> _Choice | None:
    match read_record(_RECORD).get(state):
        case [kind, version] if kind in get_args(Kind) and (version is None or version in VERSIONS):
            return _Choice(kind, version)
    return None


def _remember(state: str, choice: _Choice) -> None:
    known = list(read_record(_RECORD).items())[1 - _KEPT :]
    write_record(_RECORD, dict(known) | {state: list(choice)})
