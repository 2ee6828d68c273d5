"""Text ↔ token ids.

Text stays text: whatever a user types, `encode` never gives a control id. Control ids are put
between the texts by the chat format (`encode_mixed`). Decoding works on bytes, so that the pieces
of a stream, joined, are the whole text by construction.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from m7mlx.errors import TokenizerError
from m7mlx.tokens.messages import ChatFormat

MOST_BYTES = 64 << 20  # of a tokenizer's file
_MARKS = ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
SPACE = "▁"  # how sentencepiece writes a space inside a piece


def _one_mark_per_byte(error: UnicodeError) -> tuple[str, int]:
    """Decode each invalid byte to U+FFFD, as sentencepiece does."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("m7mlx.replace_bytes", _one_mark_per_byte)


class Detokenizer:
    """Ids → text, id by id.

    The pieces, joined, are `Tokenizer.decode` of all ids; none ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._at_start = at_start and tokenizer.adds_leading_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("m7mlx.replace_bytes")

    def add(self, token: int) -> str:
        """Return the text that `token` completes: "" inside a character and for ids without one."""
        data = self._tokenizer.token_bytes(token)
        if self._at_start and data:
            self._at_start = False
            if self._tokenizer.starts_with_space(token):
                data = data[1:]
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Return what an unfinished character leaves: U+FFFD for each of its bytes."""
        return self._utf8.decode(b"", final=True)


class Tokenizer(ABC):
    """What all kinds of tokenizer share.

    vocab_size          ids are below this
    bos_id              the id that starts a sequence, if there is one
    eos_ids             ids that end an answer
    add_bos             whether the model expects `bos_id` before a text
    adds_leading_space  whether encoding puts a space before a text, which decoding drops again
    stated_version      the version of Mistral's format that its file states, such as "v7"
    names_calls         whether the model calls a tool by name and [ARGS], not in a JSON list
    chat                the model's chat format: messages → ids
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    adds_leading_space: bool
    stated_version: str | None
    names_calls: bool
    chat: ChatFormat

    def __init__(self) -> None:
        self.stated_version = None
        self.names_calls = False
        self._bytes: dict[int, bytes] = {}
        self._without_row: dict[int, str] = {}

    def __repr__(self) -> str:
        ends = ", ".join(map(str, sorted(self.eos_ids))) or "none"
        start = "none" if self.bos_id is None else self.bos_id
        return f"{type(self).__name__}({self.vocab_size:,} tokens, start {start}, end {ends})"

    def encode_mixed(self, parts: Sequence[str | int]) -> list[int]:
        """Return the ids of texts (str) and, unchanged, those given as ids (int), in this order.

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
        """Return name → id of the tokens that are matched whole, the added ones."""

    def limit(self, rows: int) -> None:
        """Give up the tokens that the model's embedding, of so many rows, has no row for.

        Raises TokenizerError unless they are added tokens at the end of the vocabulary.
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
        """Whether `token` has a text where an answer is shown, as even <think> has."""

    @abstractmethod
    def control_ids(self) -> Mapping[str, int]:
        """Return name → id of all control tokens."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Return piece → id of all tokens."""

    @abstractmethod
    def _token_bytes(self, token: int) -> bytes: ...

    @abstractmethod
    def library(self) -> tuple[str, bytes]:
        """Return the library that encodes texts, and its model.

        That is "sentencepiece", "tokenizers" or "tiktoken". Another process can load it from these.
        """

    @abstractmethod
    def starts_with_space(self, token: int) -> bool:
        """Whether decoding drops a leading space when `token` comes first."""

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Return the ids of a text, with `add_bos` the start id before them.

        Lone surrogates become U+FFFD.
        """
        ids = self._encode_text(text)
        self._check_rows(ids)
        if not add_bos or self.bos_id is None:
            return ids
        self._check_rows([self.bos_id])
        return [self.bos_id, *ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; control ids have none."""
        stream = self.detokenizer()
        return "".join([stream.add(i) for i in ids] + [stream.finish()])

    def detokenizer(self, at_start: bool = True) -> Detokenizer:
        """Return a decoder for a stream of ids.

        at_start  False where the ids continue a text: then a leading space is kept
        """
        return Detokenizer(self, at_start)

    def control_id(self, name: str) -> int | None:
        """Return the id of the control token called `name`, if there is one."""
        return self.control_ids().get(name)

    @cached_property
    def marks(self) -> Mapping[int, str]:
        """Id → name of the control tokens that part an answer: into thoughts, calls, arguments."""
        return {token: name for name in _MARKS if (token := self.control_id(name)) is not None}

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that `token` stands for.

        There are none for ids that are not shown, and for those past the vocabulary, which a padded
        embedding has. Raises TokenizerError for a negative number.
        """
        if token >= self.vocab_size:
            return b""
        if token not in self._bytes:
            if token < 0:
                raise TokenizerError(f"{token} is not a token id")
            self._bytes[token] = self._token_bytes(token) if self.is_shown(token) else b""
        return self._bytes[token]


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
