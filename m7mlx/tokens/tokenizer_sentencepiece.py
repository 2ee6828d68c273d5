"""tokenizer.model (Google's `sentencepiece`), with text and control tokens kept apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m7mlx.errors import ConfigError, TokenizerError
from m7mlx.jsonfile import read_bytes
from m7mlx.tokens.added_tokens import BYTE, Names
from m7mlx.tokens.pieces import with_added
from m7mlx.tokens.tokenizer import MOST_BYTES, SPACE, Tokenizer, replace_surrogates

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


def stated_version(name: str) -> str | None:
    """Return the version of Mistral's format that the name of a model's file states, as "v7"."""
    found = re.search(r"\.model\.(v\d+)(?:m\d+)?$", name)
    return found[1] if found else None


class SentencePieceTokenizer(Tokenizer):
    """Mistral's tokenizer.model (v1 to v7) and its like, with tokens that fine-tunes add."""

    def __init__(self, path: Path, names: Names | None = None) -> None:
        # Here, for 50 ms: many models have a tokenizer.json alone.
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
        self.stated_version = stated_version(path.name)
        self.vocab_size = self._model.get_piece_size()
        self._pieces = pieces
        self._words = re.compile(f"({'|'.join(map(re.escape, sorted(pieces.words, key=len, reverse=True)))})")
        self.bos_id = self._id(names.role("bos_token"), original.bos_id())
        self.add_bos = self.bos_id is not None
        eos = self._id(names.role("eos_token"), original.eos_id())
        self.eos_ids = frozenset() if eos is None else frozenset({eos})
        letter = self._model.encode("a")
        self.adds_leading_space = bool(letter) and self._model.id_to_piece(letter[0]).startswith(SPACE)
        # Whether each text between control tokens gets a space in front, or the first one only:
        # transformers' setting `legacy`.
        self._spaces_each = names.settings.get("legacy") is not False

    def _id(self, name: str | None, otherwise: int) -> int | None:
        token = self._pieces.ids.get(name, otherwise) if name else otherwise
        return token if token >= 0 else None

    def _encode_mixed(self, parts: Sequence[str | int]) -> list[int]:
        # Where a prompt begins with a space transformers puts no second one before it;
        # sentencepiece, given the text alone, does.
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
            ids += (self._model if with_space else self._without_space).encode(replace_surrogates(part))
        return ids

    def _split(self, parts: Sequence[str | int]) -> list[str | int]:
        """Cut texts at the words in them that are added tokens, and put their ids there."""
        if not self._pieces.words:
            return list(parts)
        found: list[str | int] = []
        for part in parts:
            cut = [part] if isinstance(part, int) else self._words.split(part)
            found += [self._pieces.words.get(p, p) if isinstance(p, str) else p for p in cut if p != ""]
        return found

    @cached_property
    def _without_space(self) -> SentencePieceProcessor:
        """A copy of the model that puts no space before a text."""
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
