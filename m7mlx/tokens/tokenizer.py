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
from m7mlx.files.jsonfile import read_bytes, token_ids
from m7mlx.tokens.added_tokens import BYTE, Names, in_file, optional_json, read_names
from m7mlx.tokens.pieces import with_added

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    from m7mlx.tokens.formats import ChatFormat

MOST_BYTES = 64 << 20  # of a tokenizer's file
_MOST_TEMPLATE = 1 << 20
SPACE = "▁"  # how sentencepiece writes a space inside a piece


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
        if self._at_start and data:
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
        self._without_row: dict[int, str] = {}

    def encode_mixed(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of texts (str) and of ids (int, control ids above all) in the order given.

        Raises TokenizerError for an added token that the model's embedding has no row for.
        """
        ids = self._encode_mixed(parts)
        self._check_rows(ids)
        return ids

    @abstractmethod
    def _encode_mixed(self, parts: Sequence[str | int]) -> list[int]: ...

    def _encode_text(self, text: str) -> list[int]:
        return self._encode_mixed([text])

    @abstractmethod
    def added_tokens(self) -> Mapping[str, int]:
        """Name → id of the tokens that are matched whole, beside the vocabulary's own pieces."""

    def limit(self, rows: int) -> None:
        """Do without the tokens that the model's embedding has no row for.

        Raises TokenizerError unless they are a few added ones, which the model never needs.
        """
        if self.vocab_size <= rows:
            return
        added = {i: name for name, i in self.added_tokens().items() if i >= rows}
        if added.keys() != set(range(rows, self.vocab_size)):
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size} tokens but the model's embedding only {rows}; "
                "they do not belong together"
            )
        self._without_row, self.vocab_size = added, rows
        self.eos_ids = frozenset(i for i in self.eos_ids if i < rows)

    def _check_rows(self, ids: Iterable[int]) -> None:
        for i in ids if self._without_row else ():
            if i in self._without_row:
                raise TokenizerError(
                    f"the token {self._without_row[i]!r} ({i}) has no row in the model's embedding of "
                    f"{self.vocab_size}: the model cannot read it; take the model's own tokenizer files"
                )

    @abstractmethod
    def is_control(self, token: int) -> bool:
        """Whether `token` is an id that no text encodes to."""

    @abstractmethod
    def is_shown(self, token: int) -> bool:
        """Whether `token` has a text where an answer is shown; of the control tokens, <think> and its like have."""

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
        ids = self._encode_text(text)
        self._check_rows(ids)
        if not add_bos or self.bos_id is None:
            return ids
        self._check_rows([self.bos_id])
        return [self.bos_id, *ids]

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
        """The bytes `token` stands for; none for ids that are not shown, and for those of a padded embedding besides.

        Raises TokenizerError for what is no id.
        """
        if token >= self.vocab_size:
            return b""
        if token not in self._bytes:
            if token < 0:
                raise TokenizerError(f"{token} is not a token id")
            self._bytes[token] = self._token_bytes(token) if self.is_shown(token) else b""
        return self._bytes[token]


def clean(text: str) -> str:
    """`text` with lone surrogates, which no encoding has, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class SentencePieceTokenizer(Tokenizer):
    """Mistral's tokenizer.model (v1, v2, v3) and its like, with the tokens that a fine-tune added to it."""

    def __init__(self, path: Path, names: Names | None = None) -> None:
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor

        super().__init__()
        names = names or Names()
        try:
            # From bytes: the library prints to fd 2 when it cannot open or parse a file itself.
            data = read_bytes(path, MOST_BYTES) or b"empty"
            original = SentencePieceProcessor(model_proto=data)
            pieces = with_added(data, original, names)
            self._model = SentencePieceProcessor(model_proto=pieces.data)
        except (RuntimeError, ConfigError, DecodeError) as error:
            raise TokenizerError(f"{path} is not a sentencepiece model ({str(error).strip()})") from None
        try:
            for token in range(self._model.get_piece_size()):
                self._model.id_to_piece(token)
        except UnicodeDecodeError:
            raise TokenizerError(f"{path} is damaged: token {token} is not text; fetch it again") from None
        self.path = path
        self.vocab_size = self._model.get_piece_size()
        self._pieces = pieces
        self._words = re.compile(f"({'|'.join(map(re.escape, sorted(pieces.words, key=len, reverse=True)))})")
        self.bos_id = self._id(names.role("bos_token"), original.bos_id())
        self.add_bos = self.bos_id is not None
        eos = self._id(names.role("eos_token"), original.eos_id())
        self.eos_ids = frozenset() if eos is None else frozenset({eos})
        letter = self._model.encode("a")
        self.adds_leading_space = bool(letter) and self._model.id_to_piece(letter[0]).startswith(SPACE)
        # Does each text between control tokens get a space in front, or the first one only? transformers' `legacy`.
        self._spaces_each = names.settings.get("legacy") is not False

    def _id(self, name: str | None, otherwise: int) -> int | None:
        token = self._pieces.ids.get(name, otherwise) if name else otherwise
        return token if token >= 0 else None

    def _encode_mixed(self, parts: Sequence[str | int]) -> list[int]:
        # transformers puts no second space where the prompt begins with one; sentencepiece, on a text alone, does.
        begins_with_space = bool(parts) and isinstance(parts[0], str) and parts[0].startswith((" ", SPACE))
        return self._encode_parts(parts, self._spaces_each or not begins_with_space)

    def _encode_text(self, text: str) -> list[int]:
        return self._encode_parts([text], True)

    def _encode_parts(self, parts: Sequence[str | int], space_first: bool) -> list[int]:
        ids: list[int] = []
        split = self._split(parts)
        for n, part in enumerate(split):
            if isinstance(part, int):
                ids.append(part)
                continue
            before, after = split[n - 1] if n else None, split[n + 1] if n + 1 < len(split) else None
            part = part.lstrip() if before in self._pieces.strips_behind else part
            part = part.rstrip() if after in self._pieces.strips_before else part
            with_space = self._spaces_each if n else space_first
            ids += (self._model if with_space else self._without_space).encode(clean(part))
        return ids

    def _split(self, parts: Sequence[str | int]) -> list[str | int]:
        """The same, cut where texts hold words that are added tokens."""
        if not self._pieces.words:
            return list(parts)
        found: list[str | int] = []
        for part in parts:
            cut = [part] if isinstance(part, int) else self._words.split(part)
            found += [self._pieces.words.get(p, p) if isinstance(p, str) else p for p in cut if p != ""]
        return found

    @cached_property
    def _without_space(self) -> SentencePieceProcessor:
        """The same model, for texts that begin in the middle."""
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        pb: Any = sentencepiece_model_pb2
        proto = pb.ModelProto.FromString(self._pieces.data)
        proto.normalizer_spec.add_dummy_prefix = False
        return SentencePieceProcessor(model_proto=proto.SerializeToString())

    def is_control(self, token: int) -> bool:
        return bool(self._model.is_control(token)) and token not in self._word_ids

    def is_shown(self, token: int) -> bool:
        return token in self._pieces.shown or not self.is_control(token)

    @cached_property
    def _word_ids(self) -> frozenset[int]:
        return frozenset(self._pieces.words.values())

    @cached_property
    def _controls(self) -> dict[str, int]:
        found = {self._model.id_to_piece(i): i for i in range(self.vocab_size) if self.is_control(i)}
        renamed = {i: name for name, i in self._pieces.ids.items()}
        return {renamed.get(i, name): i for name, i in found.items()}

    def control_ids(self) -> Mapping[str, int]:
        return self._controls

    def added_tokens(self) -> Mapping[str, int]:
        return self._pieces.ids

    def vocabulary(self) -> dict[str, int]:
        """Piece → id of all tokens."""
        return {self._model.id_to_piece(i): i for i in range(self._model.get_piece_size())}

    def _token_bytes(self, token: int) -> bytes:
        if self._model.is_unknown(token):
            return " ⁇ ".encode()
        piece: str = self._model.id_to_piece(token)
        byte = BYTE.fullmatch(piece) if self._model.is_byte(token) else None
        return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()

    def library(self) -> tuple[str, bytes]:
        return "sentencepiece", self._pieces.data

    def starts_with_space(self, token: int) -> bool:
        return bool(self._model.id_to_piece(token).startswith(SPACE))


def load_tokenizer(folder: Path, embedding_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder, its chat format with it (`m7mlx.tokens.load`).

    Raises TokenizerError, also for tokens that the model's embedding, of the size given, has no rows for.
    """
    from m7mlx.tokens.load import Folder, chosen

    templates = _chat_templates(folder)
    names = read_names(folder, templates.values(), embedding_size)
    models = [folder / f"tokenizer.model{suffix}" for suffix in (".v3", ".v2", ".v1", "")]
    model = next((m for m in models if m.is_file()), None)
    json_file = folder / "tokenizer.json"
    if model is None and not json_file.is_file():
        raise TokenizerError(f"{folder} has no tokenizer (tokenizer.model or tokenizer.json)")
    tokenizer = chosen(Folder(folder, model, json_file if json_file.is_file() else None, names, templates))
    tokenizer.eos_ids |= _eos_ids(folder)
    if embedding_size is not None:
        try:
            tokenizer.limit(embedding_size)
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}") from None
    return tokenizer


def _eos_ids(folder: Path) -> frozenset[int]:
    """End ids that config.json and generation_config.json name."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        try:
            found |= set(token_ids(optional_json(folder / name).get("eos_token_id"), "eos_token_id"))
        except ConfigError as error:
            raise in_file(folder / name, error) from None
    return frozenset(found)


def _chat_templates(folder: Path) -> dict[str, str]:
    """The model's chat templates by name: chat_template.jinja, or those in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        try:
            return {"default": read_bytes(path, _MOST_TEMPLATE).decode("utf-8")}
        except (ConfigError, ValueError) as error:
            raise in_file(path, error) from None
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
