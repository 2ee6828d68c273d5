"""JSON schemas → masks over ids, by llguidance, in a process that `m7mlx.constrain` starts.

A stranger's schema can take any time and memory, and overflow the library's stack. So none of it is
ever prepared in the process that computes. Frames, all numbers in the machine's order:

    setup                  JSON: the vocabulary (`vocabulary`)
    "c" schema             prepare it; from here on this process is of this schema
    "g" grammar            the same for a grammar in Lark's form (`Grammar`)
    "n" [number …]         begin an answer, once the numbered ones have been forgotten; its number
    "t" number token       the answer goes on with it; as bits which ids may follow

Each reply begins with "+", or is "-" and why not.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from m7mlx.errors import InputError

MAX_SCHEMA = 200_000  # characters
NUMBER = struct.Struct("=I")
STEP = struct.Struct("=Ii")  # answer, token; −1 for none
UNUSABLE = "the JSON schema cannot be used"
_OWN = "x-guidance"  # options of llguidance's own: they could lift its limits
_STYLE: Any = {"whitespace_flexible": False}
# As Python writes JSON, and so the calls that models were trained on.
_SPACED = {**_STYLE, "item_separator": ", ", "key_separator": ": "}
_AT_ONCE = 20_000  # places of a grammar that an answer may stand at; the clock ends most before
_TOO_MUCH = ("panic", "backtrace", "fuel", "Parser Error")  # the library's limits, in its words


@dataclass(frozen=True)
class Grammar:
    """A grammar in the form of Lark that llguidance reads; JSON schemas in it come by `json_rule`.

    is_whole  whether an answer that is cut by a stop text is of no use
    """

    text: str
    is_whole: bool = True


def schema_text(schema: Mapping[str, Any]) -> str:
    """A JSON schema as JSON. Raises InputError for one that is none, or is too long."""
    try:
        text = json.dumps(schema)
    except (RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{UNUSABLE}: it is not JSON ({type(error).__name__})") from None
    if len(text) > MAX_SCHEMA:
        raise InputError(f"the JSON schema is longer than {MAX_SCHEMA:,} characters")
    if f'"{_OWN}"' in text:
        raise InputError(f"{UNUSABLE}: leave out {_OWN!r}, which is no JSON schema's")
    return text


def json_rule(schema: Mapping[str, Any], is_lenient: bool = False) -> str:
    """A JSON value of a schema, as a part of a `Grammar`. Raises as `schema_text`.

    is_lenient  leave out what cannot be enforced, instead of refusing it
    """
    schema_text(schema)
    return f"%json {json.dumps({**schema, _OWN: {**_SPACED, 'lenient': is_lenient}})}"


def handler(setup: bytes) -> Callable[[bytes], bytes]:
    """The function that answers frames, for a vocabulary."""
    from llguidance import LLTokenizer, TokenizerWrapper

    told = json.loads(setup)
    return _Answers(LLTokenizer(TokenizerWrapper(_Vocabulary(told)), eos_token=told["eos"]), told["eos"])


class _Answers:
    """The answers under way that follow one schema."""

    def __init__(self, vocabulary: Any, eos: list[int]) -> None:
        self._vocabulary, self._eos = vocabulary, eos
        self._beginning: Any = None
        self._under_way: dict[int, Any] = {}
        self._count = 0

    def __call__(self, frame: bytes) -> bytes:
        what, data = frame[:1], frame[1:]
        try:
            if what in (b"c", b"g"):
                self._prepare(what, data.decode())
                return b"+"
            return b"+" + (self._begin(data) if what == b"n" else self._step(*STEP.unpack(data)))
        except ValueError as error:
            return b"-" + _one_line(error).encode()

    def _prepare(self, what: bytes, text: str) -> None:
        from llguidance import LLMatcher, LLParserLimits

        if what == b"c":
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=_STYLE)
        else:
            grammar = LLMatcher.grammar_from_lark(text)
        limits = LLParserLimits(max_items_in_row=_AT_ONCE, step_max_items=20 * _AT_ONCE)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        _check(matcher)
        matcher.compute_bitmask()  # a schema that nothing fits shows here
        _check(matcher)
        self._beginning = matcher

    def _begin(self, forgotten: bytes) -> bytes:
        for (number,) in NUMBER.iter_unpack(forgotten):
            self._under_way.pop(number, None)
        self._count += 1
        self._under_way[self._count] = self._beginning.deep_copy()
        return NUMBER.pack(self._count)

    def _step(self, number: int, token: int) -> bytes:
        matcher = self._under_way[number]
        if token >= 0 and token not in self._eos and not matcher.consume_token(token):
            _check(matcher)
            raise ValueError(f"the token {token} does not fit")
        mask = matcher.compute_bitmask()
        _check(matcher)  # an error looks like an end
        if matcher.is_stopped():  # nothing but the end can follow
            mask = bytearray(len(mask))
            for end in self._eos:
                mask[end // 8] |= 1 << end % 8
        return bytes(mask)


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.tokens = [bytes.fromhex(token) for token in told["tokens"]]
        self.special_token_ids, self.eos_token_id, self.bos_token_id = told["special"], told["eos"][0], told["bos"]
        self._encode = _encoder(told["library"], base64.b85decode(told["data"]), self.tokens)
        # sentencepiece would put a space before what comes first
        self._after = "\n" if told["leading_space"] else ""
        self._before = len(self._encode(self._after)) if self._after else 0

    def __call__(self, text: str) -> list[int]:
        """Ids of a text in the middle of another."""
        if not isinstance(text, str):
            raise TypeError("bytes")  # llguidance asks whether it may give them
        return self._encode(self._after + text)[self._before :]


def _encoder(library: str, data: bytes, tokens: list[bytes]) -> Callable[[str], list[int]]:
    if library == "sentencepiece":
        from sentencepiece import SentencePieceProcessor

        encode: Callable[[str], list[int]] = SentencePieceProcessor(model_proto=data).encode
        return encode
    if library == "tiktoken":
        import tiktoken

        told = json.loads(data)
        first: int = told["first"]
        ranks = {token: rank for rank, token in enumerate(tokens[first:])}
        encoding = tiktoken.Encoding("", pat_str=told["pattern"], mergeable_ranks=ranks, special_tokens={})
        return lambda text: [first + rank for rank in encoding.encode_ordinary(text)]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(data.decode())
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise ValueError(matcher.get_error())


def _one_line(error: object) -> str:
    """llguidance's words for what a schema lacks; those of its inside are of no use to anybody."""
    said = str(error).partition("<state>")[0]
    if any(word in said for word in _TOO_MUCH):
        return "it allows too much at once; make it simpler"
    return " ".join(said.replace("NoExtensionBias", "nothing fits it").split())[:300]
