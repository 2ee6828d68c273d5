"""The choice of a tokenizer and a chat format: a folder's own template, or Mistral's format for it.

The template that comes with a model is the truth. Mistral's format, which also takes what templates
refuse (several questions in a row, a system prompt later on), replaces it only where nothing is
lost:

- the folder has no template, and Mistral's own vocabulary;
- the template is one that Mistral published: those models were made with mistral-common;
- or both give the same ids, or both refuse, for each of a set of probing conversations.

The choice is remembered for each state of the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, NamedTuple

from m7mlx.errors import ChatFormatError, TokenizerError
from m7mlx.files.records import read_record, write_record
from m7mlx.tokens.added_tokens import Names
from m7mlx.tokens.messages import ChatFormat, Message
from m7mlx.tokens.mistral_format import MistralFormat, Version, mistral_version
from m7mlx.tokens.template_format import TemplateFormat
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tokens.tokenizer_json import JsonTokenizer
from m7mlx.tokens.tokenizer_sentencepiece import SentencePieceTokenizer

# SHA-256 of the templates that Mistral published for 7B Instruct v0.1 to v0.3, of their lines
# without indentation.
_PUBLISHED = {
    "7e995b379ec01747807246483647cd99030abf331653f1119e16d7ac041a3495",  # v0.1 and v0.2, 2023
    "26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7",  # v0.2 and v0.3, 2024
    "36bf53d17d6269f064a8ace51f792a9a4ae2bc91486ce5df8de00002a28ee5bd",  # v0.1, v0.2: system prompt
    "8be58afa35e97d75e65e750f012bcd48260514fe7e24352fca0acb8b7247d111",  # v0.3, with tools
    "304ce9c2d9ed2c50062f05910735ae4832f782a0fb2d2560e8b0644ce44625a6",  # the same, later
}
_SIZES = {"v1": 32000, "v2": 32768, "v3": 32768}  # of Mistral's sentencepiece vocabularies
_RECORD = "chat-formats.json"
_RULES = 1  # counts up when the rules of the choice change
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


class Folder(NamedTuple):
    """A model folder, as far as the choice depends on it."""

    path: Path
    model: Path | None  # sentencepiece's
    json: Path | None
    names: Names
    templates: Mapping[str, str]


class _Choice(NamedTuple):
    uses_model: bool
    version: Version | None  # of Mistral's format; None: the folder's own template


def make_tokenizer(folder: Folder) -> Tokenizer:
    """Load a folder's tokenizer and give it its chat format. Raises TokenizerError."""
    state = _state(folder)
    choice = _remembered(state)
    if choice is None or (choice.uses_model and not folder.model) or not (choice.uses_model or folder.json):
        choice = _choose(folder)
        _remember(state, choice)
    tokenizer = _read(folder, choice.uses_model)
    if choice.version:
        tokenizer.chat = MistralFormat(tokenizer, choice.version)
    else:
        tokenizer.chat = TemplateFormat(tokenizer, folder.templates, folder.names.settings)
    return tokenizer


def _read(folder: Folder, uses_model: bool) -> Tokenizer:
    if uses_model:
        assert folder.model is not None
        return SentencePieceTokenizer(folder.model, folder.names)
    assert folder.json is not None
    return JsonTokenizer(folder.json, folder.names)


def _choose(folder: Folder) -> _Choice:
    own = _read(folder, uses_model=folder.json is None)
    mistrals = own
    if isinstance(own, JsonTokenizer) and folder.model:
        try:
            beside = SentencePieceTokenizer(folder.model, folder.names)
            if beside.vocabulary() == own.vocabulary():
                mistrals = beside  # sentencepiece gives the very ids of mistral-common
        except TokenizerError:  # a damaged file, which is not needed
            pass
    uses_model = isinstance(mistrals, SentencePieceTokenizer)
    version = mistral_version(mistrals)
    if version and _is_mistrals(folder, own, mistrals, version):
        return _Choice(uses_model, version)
    return _Choice(folder.json is None, None)


def _is_mistrals(folder: Folder, own: Tokenizer, mistrals: Tokenizer, version: Version) -> bool:
    if not folder.templates:
        return version != "v1" or mistrals.vocab_size == _SIZES[version]
    template = folder.templates.get("default")
    if template is None:
        return False
    if _digest(template) in _PUBLISHED and mistrals.vocab_size == _SIZES[version]:
        return True
    theirs = TemplateFormat(own, folder.templates, folder.names.settings)
    ours = MistralFormat(mistrals, version)
    knows_tools = any("tool" in text for text in folder.templates.values())
    return all(_ids(ours, *probe) == _ids(theirs, *probe) for probe in _probes(knows_tools))


def _ids(chat: ChatFormat, messages: list[Message], tools: list[Any]) -> list[int] | None:
    try:
        return chat.encode(messages, tools)
    except (ChatFormatError, TokenizerError):
        return None


def _probes(knows_tools: bool) -> list[tuple[list[Message], list[Any]]]:
    """Return conversations of all kinds, with tools where the template knows them."""
    system: Message = {"role": "system", "content": "Be brief, in two\nlines."}
    hello: Message = {"role": "user", "content": "Hello, you"}
    bye: Message = {"role": "user", "content": "1 + 2?"}
    answer: Message = {"role": "assistant", "content": "Hi there."}
    call: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    result: Message = {"role": "tool", "tool_call_id": _CALL["id"], "name": "sum", "content": '{"sum": 3}'}
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
    for path in (folder.model, folder.json, *(folder.path / name for name in names)):
        data = path.read_bytes() if path and path.is_file() else b""
        told.update(f"{path.name if path else None} {len(data)} ".encode() + data)
    told.update(json.dumps(dict(folder.templates)).encode())
    return told.hexdigest()


def _remembered(state: str) -> _Choice | None:
    match read_record(_RECORD).get(state):
        case [bool() as uses_model, None | "v1" | "v2" | "v3" as version]:
            return _Choice(uses_model, version)
    return None


def _remember(state: str, choice: _Choice) -> None:
    known = list(read_record(_RECORD).items())[1 - _KEPT :]
    write_record(_RECORD, dict(known) | {state: list(choice)})
