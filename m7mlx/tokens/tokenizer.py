"""Text ↔ token ids.

Text stays text: whatever a user types, `encode` never gives a control id. Control ids are put between the
texts by the chat format (`encode_mixed`). Decoding works on bytes, so that a stream of pieces and the full
text are the same thing by construction.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from m7mlx.errors import TokenizerError
from m7mlx.tokens.messages import ChatFormat

MOST_BYTES = 64 << 20  # of a tokenizer's file
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


def without_surrogates(text: str) -> str:
    """`text` with lone surrogates, which no encoding has, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
