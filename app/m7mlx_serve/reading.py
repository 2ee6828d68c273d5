"""A request's body → what the engine is asked: JSON, its fields, and the ids of its prompt.

All that strangers' text can make slow or large happens here. Nothing is waited for and nothing is
shared, so that it can run anywhere: `readers` says where.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ValidationError

from m7mlx.tokens.messages import MAX_DEPTH, nests_deeper
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.endpoint import Body, ReadRequest
from m7mlx_serve.endpoints import ENDPOINTS
from m7mlx_serve.errors import ApiError
from m7mlx_serve.named import meant, unknown_model
from m7mlx_serve.refusals import describe

_Shape = TypeVar("_Shape", bound=Body)
_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F]")


def read(
    path: str,
    data: bytes,
    model: str,
    tokenizer: Tokenizer,
    held: Mapping[str, bytes] = MappingProxyType({}),
) -> ReadRequest:
    """Read a body that came for `path`, of a server of `model`.

    held  conversations that the body may go on from, by id (`Prompts.held`)

    Raises ApiError, and InputError for what the model cannot do.
    """
    body = parse(data, ENDPOINTS[path].body)
    if meant(body.model, [model]) != model:
        raise unknown_model(body.model, [model])
    try:
        prompts = body.following(held).prompts(tokenizer)
    except RecursionError:
        raise ApiError(400, f"the request nests deeper than {MAX_DEPTH} levels") from None
    return ReadRequest(body.without_texts(), prompts)


def parse(data: bytes, shape: type[_Shape]) -> _Shape:
    """The JSON of a body in its shape. Raises ApiError with what is wrong first, and where."""
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite)
        if nests_deeper(value, MAX_DEPTH):
            raise RecursionError
        if _SURROGATES.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # halves of characters, names of fields included
    except RecursionError:
        raise ApiError(400, f"the body nests deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise ApiError(400, "the body is not valid JSON") from None
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        raise ApiError(400, describe(error)) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is too large")
    return value
