"""Prompts in any of the forms that OpenAI's clients send: a text, ids, or a list of either."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from m7mlx.errors import InputError, TokenizerError
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.strict import MAX_TEXT, Text

_MOST = 2048  # OpenAI's
_LARGEST_ID = (1 << 31) - 1  # beyond the ids of any vocabulary
_Ids = Annotated[list[int], Field(min_length=1, max_length=MAX_TEXT, fail_fast=True)]


def _check_number(given: Any) -> Any:
    """Count before each is looked at. Raises ValueError for too many."""
    if isinstance(given, list) and len(given) > _MOST and not isinstance(given[0], int):
        raise ValueError(f"at most {_MOST:,} texts are taken at a time; send fewer")
    return given


Inputs = Annotated[
    Text
    | _Ids
    | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
    | Annotated[list[_Ids], Field(min_length=1, fail_fast=True)],
    BeforeValidator(_check_number),
]


def encode_inputs(tokenizer: Tokenizer, given: str | Sequence[Any], name: str) -> list[array[int]]:
    """The ids of each. Raises InputError, which names the field `name`, and TokenizerError."""
    many: Sequence[Any] = [given] if isinstance(given, str) else given
    if isinstance(many[0], int):
        many = [many]
    if sum(map(len, many)) > MAX_TEXT:
        raise InputError(f"{name}: all together are longer than {MAX_TEXT:,}; send fewer at a time")
    return [_encode(tokenizer, one) for one in many]


def _encode(tokenizer: Tokenizer, prompt: str | list[int]) -> array[int]:
    if isinstance(prompt, str):
        return array("i", tokenizer.encode(prompt, add_bos=tokenizer.add_bos))
    if beyond := next((token for token in prompt if not 0 <= token <= _LARGEST_ID), None):
        raise TokenizerError(f"token id {beyond} is outside the model's vocabulary")
    return array("i", prompt)
