"""A request's body → what the engine is asked: JSON, its fields, and the ids of its prompt.

All that strangers' text can make slow or large happens here. Nothing is waited for and nothing shared, so that it can
run anywhere: `readers` says where.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from m7mlx.errors import InputError, PromptTooLongError, TokenizerError
from m7mlx.grammar import MAX_SCHEMA
from m7mlx.tokens.messages import MAX_DEPTH, nests_deeper
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.errors import ApiError
from m7mlx_serve.schemas import ChatMessage, ChatRequest, CompletionRequest, Function, NamedTool, Tool
from m7mlx_serve.tool_calls import MARK

Body = ChatRequest | CompletionRequest
SCHEMAS: Mapping[str, type[Body]] = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
_SURROGATES = re.compile(rb"\\u[dD][89a-fA-F]")
_MOST = (1 << 31) - 1  # larger ids than any vocabulary has


@dataclass(frozen=True)
class Asked:
    """A request that has been read.

    body  its options; texts that nobody needs any more are left out
    ids   of its prompt
    """

    body: Body
    ids: array[int]


def read(path: str, data: bytes, model: str, tokenizer: Tokenizer) -> Asked:
    """Read a body that came for `path`, of a server of `model`.

    Raises ApiError, and InputError for what the model cannot do.
    """
    body = parsed(data, SCHEMAS[path])
    if body.model != model:
        raise ApiError(404, f"the model {body.model[:100]!r} is not served here", "model_not_found")
    if body.stream_options and not body.stream:
        raise ApiError(400, "stream_options is for streams: set stream")
    try:
        ids = _chat_ids(body, tokenizer) if isinstance(body, ChatRequest) else _text_ids(body, tokenizer)
    except RecursionError:
        raise ApiError(400, f"the request nests deeper than {MAX_DEPTH} levels") from None
    return Asked(_without_texts(body), ids)


def parsed(data: bytes, schema: type[Body]) -> Body:
    """Raises ApiError with the place and the reason of what is wrong, as far as it is looked for."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
        if nests_deeper(value, MAX_DEPTH):
            raise RecursionError
        if _SURROGATES.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # halves of characters, names of fields included
    except RecursionError:
        raise ApiError(400, f"the body nests deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise ApiError(400, "the body is not valid JSON") from None
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg'].removeprefix('Value error, ')}"[:300]
            for e in error.errors(include_url=False, include_context=False, include_input=False)[:5]
        ]
        raise ApiError(400, "; ".join(wrong)) from None


def demanded(body: Body) -> list[Tool] | None:
    """The tools one of which must be called; None where the model may answer otherwise."""
    if not isinstance(body, ChatRequest):
        return None
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        return [tool for tool in body.tools or [] if tool.function.name == name]
    return body.tools if body.tool_choice == "required" else None


def refusal(error: InputError) -> ApiError:
    """Of what the model cannot do."""
    code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None
    return ApiError(400, str(error), code)


def _chat_ids(body: ChatRequest, tokenizer: Tokenizer) -> array[int]:
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []] if body.tool_choice != "none" else []
    mark = tokenizer.control_id(MARK)
    if tools and mark is None:
        raise InputError("this model's chat format has no tools; leave out tools")
    ids = array("i", tokenizer.chat.encode([message.plain() for message in body.messages], tools))
    if demanded(body) is not None and mark is not None:
        ids.append(mark)
    return ids


def _text_ids(body: CompletionRequest, tokenizer: Tokenizer) -> array[int]:
    if isinstance(body.prompt, str):
        return array("i", tokenizer.encode(body.prompt, add_bos=tokenizer.add_bos))
    if beyond := next((token for token in body.prompt if not 0 <= token <= _MOST), None):
        raise TokenizerError(f"token id {beyond} is outside the model's vocabulary")
    return array("i", body.prompt)


def _without_texts(body: Body) -> Body:
    """What remains is small, and costs nothing to hand on: options, and the schemas that an answer must follow."""
    if isinstance(body, CompletionRequest):
        return body.model_copy(update={"prompt": ""})
    must = demanded(body) or []
    schemas = [tool.function.parameters for tool in must]
    if body.response_format and body.response_format.json_schema:
        schemas.append(body.response_format.json_schema.schema_)
    if sum(len(json.dumps(schema)) for schema in schemas) > MAX_SCHEMA:
        raise InputError(f"the JSON schema is longer than {MAX_SCHEMA:,} characters")
    named = {tool.function.name: tool.function.parameters for tool in must}
    names = [tool.function.name for tool in body.tools or []]
    tools = [Tool(type="function", function=Function(name=n, parameters=named.get(n, {}))) for n in names]
    last = body.messages[-1]
    nothing = [ChatMessage(role=last.role, content="", prefix=last.prefix)]
    return body.model_copy(update={"messages": nothing, "tools": tools or None})


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is too large")
    return value
