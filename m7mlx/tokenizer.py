"""Text ↔ token ids.

Text stays text: whatever a user types, `encode` never gives a control id. Control ids are put between the
texts by the chat format (`encode_mixed`). Decoding works on bytes, so that a stream of pieces and the full
text are the same thing by construction.
"""

from __future__ import annotations

import codecs
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m7mlx.errors import ConfigError, TokenizerError
from m7mlx.jsonfile import given, read_bytes, read_json, said, token_ids

if TYPE_CHECKING:
    from m7mlx.chat import ChatFormat

MOST_BYTES = 64 << 20  # of a tokenizer's file
_MOST_TEMPLATE = 1 << 20
SPACE = "▁"  # how sentencepiece writes a space inside a piece
_MISTRAL_CONTROLS = 771  # ids 0 … 770 of the v2 and v3 vocabularies
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _one_mark_per_byte(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for each invalid byte, as sentencepiece does it."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("m7mlx.replace_bytes", _one_mark_per_byte)


class Detokenizer:
    """Ids → text, id by id. The pieces joined are `Tokenizer.decode` of all ids; none ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._at_start = at_start and tokenizer.adds_leading_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("m7mlx.replace_bytes")

    def add(self, token: int) -> str:
        """The text that `token` completes; "" for ids without a text and inside a multi-byte character."""
        data = self._tokenizer.token_bytes(token)
        if self._at_start and token < self._tokenizer.vocab_size and not self._tokenizer.is_control(token):
            self._at_start = False
            if self._tokenizer.starts_with_space(token):
                data = data[1:]
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What an unfinished character leaves: a replacement mark per byte."""
        return self._utf8.decode(b"", final=True)


class Tokenizer(ABC):
    """What both kinds of tokenizer share.

    vocab_size  ids are below this
    bos_id      the id that starts a sequence, if the model wants one (`add_bos`)
    eos_ids     ids that end an answer
    chat        messages → ids
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    adds_leading_space: bool
    chat: ChatFormat

    def __init__(self) -> None:
        self._bytes: dict[int, bytes] = {}

    @abstractmethod
    def encode_mixed(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of texts (str) and of ids (int, control ids above all) in the order given."""

    @abstractmethod
    def is_control(self, token: int) -> bool:
        """Whether `token` is an id that no text encodes to."""

    @abstractmethod
    def control_ids(self) -> Mapping[str, int]:
        """Name → id of all control tokens."""

    @abstractmethod
    def _token_bytes(self, token: int) -> bytes: ...

    @abstractmethod
    def library(self) -> tuple[str, bytes]:
        """Name and data of what encodes texts, for another process: "sentencepiece" or "tokenizers"."""

    @abstractmethod
    def starts_with_space(self, token: int) -> bool:
        """Whether decoding drops a leading space when `token` comes first."""

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of a text; with `add_bos` the start id before them. Lone surrogates become U+FFFD."""
        ids = self.encode_mixed([text])
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, control ids left out."""
        stream = self.detokenizer()
        return "".join([stream.add(i) for i in ids] + [stream.finish()])

    def detokenizer(self, at_start: bool = True) -> Detokenizer:
        """A stream decoder; at_start=False where the ids continue a text, whose leading space is then kept."""
        return Detokenizer(self, at_start)

    def control_id(self, name: str) -> int | None:
        """The id of the control token called `name`, if there is one."""
        return self.control_ids().get(name)

    def token_bytes(self, token: int) -> bytes:
        """The bytes `token` stands for; none for control ids, and for those that a padded embedding has besides.

        Raises TokenizerError for what is no id.
        """
        if token >= self.vocab_size:
            return b""
        if token not in self._bytes:
            if token < 0:
                raise TokenizerError(f"{token} is not a token id")
            self._bytes[token] = b"" if self.is_control(token) else self._token_bytes(token)
        return self._bytes[token]


def clean(text: str) -> str:
    """`text` with lone surrogates, which no encoding has, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class SentencePieceTokenizer(Tokenizer):
    """Mistral's tokenizer.model (v1, v2, v3) and its like."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        super().__init__()
        try:
            # From bytes: the library prints to fd 2 when it cannot open or parse a file itself.
            self._model = SentencePieceProcessor(model_proto=read_bytes(path, MOST_BYTES) or b"empty")
        except (RuntimeError, ConfigError) as error:
            raise TokenizerError(f"{path} is not a sentencepiece model ({str(error).strip()})") from None
        try:
            for token in range(self._model.get_piece_size()):
                self._model.id_to_piece(token)
        except UnicodeDecodeError:
            raise TokenizerError(f"{path} is damaged: token {token} is not text; fetch it again") from None
        self.path = path
        self.vocab_size = self._model.get_piece_size()
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.add_bos = self.bos_id is not None
        self.eos_ids = frozenset({self._model.eos_id()} - {-1})
        letter = self._model.encode("a")
        self.adds_leading_space = bool(letter) and self._model.id_to_piece(letter[0]).startswith(SPACE)

    def encode_mixed(self, parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._model.encode(clean(part))
        return ids

    def is_control(self, token: int) -> bool:
        if token < _MISTRAL_CONTROLS and "[INST]" in self.control_ids():
            return token != self._model.unk_id()
        return bool(self._model.is_control(token))

    @cached_property
    def _controls(self) -> dict[str, int]:
        ids = (i for i in range(self.vocab_size) if self._model.is_control(i))
        return {self._model.id_to_piece(i): i for i in ids}

    def control_ids(self) -> Mapping[str, int]:
        return self._controls

    def _token_bytes(self, token: int) -> bytes:
        if self._model.is_unknown(token):
            return " ⁇ ".encode()
        piece: str = self._model.id_to_piece(token)
        byte = _BYTE.fullmatch(piece) if self._model.is_byte(token) else None
        return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()

    def library(self) -> tuple[str, bytes]:
        return "sentencepiece", self._model.serialized_model_proto()

    def starts_with_space(self, token: int) -> bool:
        return bool(self._model.id_to_piece(token).startswith(SPACE))


def load_tokenizer(folder: Path, embedding_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder, its chat format with it.

    Raises TokenizerError; also for a tokenizer of more tokens than the model's embedding has rows, where given.

    Mistral's own sentencepiece model is taken where its chat format applies, since control tokens and
    text are apart there from the start; otherwise tokenizer.json.
    """
    from m7mlx.chat import MistralFormat, TemplateFormat, mistral_version
    from m7mlx.tokenizer_json import JsonTokenizer

    settings = _settings(folder / "tokenizer_config.json")
    templates = _chat_templates(folder, settings)
    is_mistral_chat = "default" not in templates or "[INST]" in templates["default"]
    models = [folder / f"tokenizer.model{suffix}" for suffix in (".v3", ".v2", ".v1", "")]
    model = next((m for m in models if m.is_file()), None)
    json_file = folder / "tokenizer.json"
    tokenizer: Tokenizer
    if model and (not json_file.is_file() or (is_mistral_chat and not _has_added_tokens(folder, settings))):
        tokenizer = SentencePieceTokenizer(model)
    elif json_file.is_file():
        tokenizer = JsonTokenizer(json_file, settings)
    else:
        raise TokenizerError(f"{folder} has no tokenizer (tokenizer.model or tokenizer.json)")
    if embedding_size is not None and tokenizer.vocab_size > embedding_size:
        raise TokenizerError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model's embedding only "
            f"{embedding_size}; they do not belong together"
        )
    tokenizer.eos_ids |= _eos_ids(folder)
    version = mistral_version(tokenizer)
    if is_mistral_chat and version:
        tokenizer.chat = MistralFormat(tokenizer, version)
    else:
        tokenizer.chat = TemplateFormat(tokenizer, templates, settings)
    return tokenizer


def _has_added_tokens(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a fine-tune put tokens past the end of the sentencepiece vocabulary."""
    if _optional_json(folder / "added_tokens.json"):
        return True
    tokens = (t.get("content") for t in (settings.get("added_tokens_decoder") or {}).values())
    return any(t in ("<|im_start|>", "<|im_end|>") for t in tokens)


def _eos_ids(folder: Path) -> frozenset[int]:
    """End ids that config.json and generation_config.json name."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        try:
            found |= set(token_ids(_optional_json(folder / name).get("eos_token_id"), "eos_token_id"))
        except ConfigError as error:
            raise _in_file(folder / name, error) from None
    return frozenset(found)


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The model's chat templates by name: chat_template.jinja, or those in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        try:
            return {"default": read_bytes(path, _MOST_TEMPLATE).decode("utf-8")}
        except (ConfigError, ValueError) as error:
            raise _in_file(path, error) from None
    found = settings.get("chat_template")
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


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the fields that are used here as they should be. Raises TokenizerError."""
    settings = _optional_json(path)
    try:
        for field in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = settings.get(field)
            if token is not None and not isinstance(token.get("content") if isinstance(token, dict) else token, str):
                raise ConfigError(f"{field} must be a text, or an object with a text as content, not {said(token)}")
        decoder = given(settings, "added_tokens_decoder", "an object") or {}
        if not all(isinstance(token, dict) for token in decoder.values()):
            raise ConfigError("added_tokens_decoder must hold objects by id")
        adds = settings.get("add_bos_token")
        if adds is not None and not isinstance(adds, bool):
            raise ConfigError(f"add_bos_token must be true or false, not {said(adds)}")
    except ConfigError as error:
        raise _in_file(path, error) from None
    return settings


def _in_file(path: Path, error: Exception) -> TokenizerError:
    return TokenizerError(f"{error}" if str(path) in str(error) else f"{path}: {error}")


def _optional_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except ConfigError as error:
        raise _in_file(path, error) from None
