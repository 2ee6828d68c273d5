"""Large bodies, read in a process of its own (`m7mlx.worker`), which the operating system bounds.

The libraries that parse and tokenise hold the interpreter: of 8 MB, for seconds. Frames, after the setup:

    request    path, model and body, each but the last ended by a line feed
    reply      a line: an error as JSON, or the size of the first of what follows: options as JSON; ids, in four bytes
"""

from __future__ import annotations

import gc
import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path

from m7mlx.config import ModelConfig
from m7mlx.errors import InputError
from m7mlx.tokens.load import load_tokenizer
from m7mlx_serve.errors import ApiError
from m7mlx_serve.reading import SCHEMAS, Asked, read, refusal


def handler(setup: bytes) -> Callable[[bytes], bytes]:
    """`setup` is the model's folder."""
    os.nice(10)  # whoever is answered already comes first
    folder = Path(setup.decode())
    tokenizer = load_tokenizer(folder, ModelConfig.from_folder(folder).vocab_size)
    gc.disable()  # of a million lists, it takes four times as long as parsing them

    def answer(frame: bytes) -> bytes:
        gc.collect()
        path, model, data = frame.split(b"\n", 2)
        try:
            asked = read(path.decode(), data, json.loads(model), tokenizer)
        except InputError as error:
            return _told(refusal(error))
        except ApiError as error:
            return _told(error)
        options = asked.body.model_dump_json(by_alias=True, exclude_none=True).encode()
        return b"%d\n" % len(options) + options + asked.ids.tobytes()

    return answer


def question(path: str, data: bytes, model: str) -> bytes:
    """The frame that asks to read a body."""
    return path.encode() + b"\n" + json.dumps(model).encode() + b"\n" + data


def asked(path: str, reply: bytes) -> Asked:
    """What the process has read. Raises ApiError with what it refused."""
    head, _, rest = reply.partition(b"\n")
    found = json.loads(head)
    if isinstance(found, list):
        status, message, code = found
        raise ApiError(status, message, code)
    ids = array("i")
    ids.frombytes(memoryview(rest)[found:])
    return Asked(SCHEMAS[path].model_validate_json(rest[:found]), ids)


def _told(error: ApiError) -> bytes:
    return json.dumps([error.status, str(error), error.code]).encode() + b"\n"
