"""Large bodies, read in a process of its own (`m7mlx.worker`), which the operating system bounds.

The libraries that parse and tokenise hold the interpreter: for seconds, with a body of 8 MB. After
the setup, frames are:

    question   path, model and conversations held (as JSON), and body, each but the last ended by a
               line feed
    reply      a line: an error as JSON, or the size of the options; then the options as JSON, the
               ids of all prompts and of the prediction in four bytes each, and the conversation to
               be held
"""

from __future__ import annotations

import gc
import json
import os
from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from m7mlx.config import ModelConfig
from m7mlx.errors import InputError
from m7mlx.grammar import Grammar
from m7mlx.tokens.load import load_tokenizer
from m7mlx_serve.endpoint import Prompts, ReadRequest
from m7mlx_serve.endpoints import ENDPOINTS
from m7mlx_serve.errors import ApiError, refusal
from m7mlx_serve.reading import read


def handler(setup: bytes) -> Callable[[bytes], bytes]:
    """The function that reads bodies for the model in the folder `setup`."""
    os.nice(10)  # those who are answered already come first
    folder = Path(setup.decode())
    tokenizer = load_tokenizer(folder, ModelConfig.from_folder(folder).vocab_size)
    gc.disable()  # among a million lists it takes four times as long as parsing them

    def answer(frame: bytes) -> bytes:
        gc.collect()
        path, told, data = frame.split(b"\n", 2)
        model, texts = json.loads(told)
        held = {id: text.encode() for id, text in texts.items()}
        try:
            request = read(path.decode(), data, model, tokenizer, held)
        except InputError as error:
            return _pack_error(refusal(error))
        except ApiError as error:
            return _pack_error(error)
        return pack_reply(request)

    return answer


def pack_question(path: str, data: bytes, model: str, held: Mapping[str, bytes]) -> bytes:
    """The frame that asks to read a body."""
    told = [model, {id: text.decode() for id, text in held.items()}]
    return path.encode() + b"\n" + json.dumps(told).encode() + b"\n" + data


def pack_reply(request: ReadRequest) -> bytes:
    """The frame that answers with a request."""
    prompts = request.prompts
    told = {
        "body": request.body.model_dump(mode="json", by_alias=True, exclude_none=True),
        "lengths": [len(ids) for ids in (*prompts.ids, prompts.prediction)],
        "schema": asdict(prompts.schema) if isinstance(prompts.schema, Grammar) else prompts.schema,
        "is_grammar": isinstance(prompts.schema, Grammar),
        "tool_use": prompts.tool_use,
        "at_start": prompts.at_start,
    }
    head = json.dumps(told).encode()
    ids = [one.tobytes() for one in (*prompts.ids, prompts.prediction)]
    return b"".join([b"%d\n" % len(head), head, *ids, prompts.held])


def unpack_reply(path: str, reply: bytes) -> ReadRequest:
    """The request that the process has read. Raises the ApiError that it refused the body with."""
    first, _, rest = reply.partition(b"\n")
    found = json.loads(first)
    if isinstance(found, list):
        status, message, code = found
        raise ApiError(status, message, code)
    told, data, prompts = json.loads(rest[:found]), memoryview(rest)[found:], []
    for length in told["lengths"]:
        ids = array("i")
        size = length * ids.itemsize
        ids.frombytes(data[:size])
        prompts.append(ids)
        data = data[size:]
    prediction = prompts.pop()
    schema = Grammar(**told["schema"]) if told["is_grammar"] else told["schema"]
    return ReadRequest(
        ENDPOINTS[path].body.model_validate(told["body"]),
        Prompts(prompts, schema, told["tool_use"], told["at_start"], bytes(data), prediction),
    )


def _pack_error(error: ApiError) -> bytes:
    return json.dumps([error.status, str(error), error.code]).encode() + b"\n"
