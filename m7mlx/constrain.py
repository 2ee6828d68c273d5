"""Answers that follow a grammar: a JSON schema, by masks from llguidance (extra `server`).

Before each token the grammar says which ids may come next; the end token may where the answer is complete. The model
chooses among them, so that what comes out always fits, and the schema need not be explained to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from m7mlx.errors import InputError

if TYPE_CHECKING:
    from m7mlx.tokenizer import Tokenizer

MAX_SCHEMA = 200_000  # characters
_AT_ONCE = 1000  # places of a grammar that an answer may stand at
_UNUSABLE = "the JSON schema cannot be used"


class Constraint:
    """Where one answer stands in its grammar, that of `schema`; None is any object."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer, schema: Mapping[str, Any] | None = None) -> None:
        self.schema = schema
        self._matcher, self._vocab_size, self._eos_ids = matcher, tokenizer.vocab_size, sorted(tokenizer.eos_ids)

    def mask(self, vocab_size: int) -> mx.array:
        """Which ids may come next: bool [vocab_size]."""
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        allowed = np.zeros(vocab_size, bool)
        if self._matcher.is_stopped():  # nothing can follow
            allowed[self._eos_ids] = True
            return mx.array(allowed)
        words = allocate_token_bitmask(1, self._vocab_size)
        fill_next_token_bitmask(self._matcher, words, 0)
        if self._matcher.is_error():
            raise InputError(f"{_UNUSABLE}: it asks for too many possibilities at once")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: min(vocab_size, self._vocab_size)]
        allowed[: bits.size] = bits
        return mx.array(allowed)

    def accept(self, token: int) -> None:
        """The answer goes on with `token`."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


def json_constraint(tokenizer: Tokenizer, schema: Mapping[str, Any] | None = None) -> Constraint:
    """An answer that is one JSON value of a schema; without one, any object.

    Raises InputError for a schema that is none, or that asks for what cannot be enforced, and without llguidance.
    """
    try:
        from llguidance import LLMatcher, LLParserLimits
    except ImportError:
        raise InputError("answers in JSON need llguidance: pip install 'm7mlx[server]'") from None
    text = json.dumps({"type": "object"} if schema is None else schema)
    if len(text) > MAX_SCHEMA:
        raise InputError(f"the JSON schema is longer than {MAX_SCHEMA:,} characters")
    try:
        grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
        # What it would log is of the answer. Limits: one mask may not hold up the others that share a batch.
        limits = LLParserLimits(max_items_in_row=_AT_ONCE, step_max_items=20 * _AT_ONCE)
        matcher = LLMatcher(_vocabulary(tokenizer), grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # here, not where others wait, and a schema that nothing fits shows
    except ValueError as error:
        raise InputError(f"{_UNUSABLE}: {_one_line(error)}") from None
    if matcher.is_error():
        raise InputError(f"{_UNUSABLE}: {_one_line(matcher.get_error())}")
    return Constraint(matcher, tokenizer, schema)


def _one_line(error: object) -> str:
    said = str(error).partition("<state>")[0].replace("NoExtensionBias", "nothing fits it")  # llguidance's words
    return " ".join(said.split())[:300]


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    """The bytes of all ids, in llguidance's own form."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Ids(tokenizer)), eos_token=sorted(tokenizer.eos_ids))


class _Ids:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id, self.bos_token_id = min(tokenizer.eos_ids), tokenizer.bos_id
        self.special_token_ids = [i for i in ids if tokenizer.is_control(i)]
        names = {i: name.encode() for name, i in tokenizer.control_ids().items()}
        self.tokens = [
            names.get(i, b"<control>") if tokenizer.is_control(i) else tokenizer.token_bytes(i) for i in ids
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Ids of a text in the middle of another: sentencepiece would put a space before it."""
        if not isinstance(text, str):
            raise TypeError("bytes")  # llguidance asks whether it may give them
        if not self._tokenizer.adds_leading_space:
            return self._tokenizer.encode(text)
        newline = self._tokenizer.encode("\n")
        return self._tokenizer.encode("\n" + text)[len(newline) :]
