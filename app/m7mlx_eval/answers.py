"""From the options of a task's answers to a request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from m7mlx import Request, Sampling
from m7mlx.errors import InputError

# Names of the longest answer; the first that is given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LENGTH = 256
_SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float}


def generation_request(ids: Sequence[int], options: Mapping[str, Any], max_length: int, repeat: int) -> Request:
    """Make a request for the prompt `ids`, cut on the left.

    max_length  tokens of prompt and answer together, at most
    repeat      the number of this answer among those to the same question: those that are drawn
                differ, and are the same in another run

    Raises InputError for options that are not understood.
    """
    left = dict(options)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    length = next((left[name] for name in _LENGTHS if left.get(name) is not None), _DEFAULT_LENGTH)
    draws = left.pop("do_sample", None)
    try:
        given = {name: kind(left[name]) for name, kind in _SAMPLING.items() if left.get(name) is not None}
        length = int(length)
    except (TypeError, ValueError):
        raise InputError(f"generation_kwargs of a task cannot be used: {dict(options)!r}") from None
    if unknown := [name for name in left if name not in (*_LENGTHS, *_SAMPLING)]:
        raise InputError(f"generation_kwargs of a task ask for {', '.join(unknown)}, which there is not here")
    if not 0 < length < max_length:
        raise InputError(f"a task asks for answers of {length} tokens, where the context holds {max_length}")
    if draws is None:
        draws = given.get("temperature", 0) > 0
    if draws:
        digest = hashlib.sha256(json.dumps([list(ids), repeat]).encode()).digest()
        sampling = Sampling(**{"temperature": 1.0} | given, seed=int.from_bytes(digest[:6], "big"))
    else:
        sampling = Sampling(repetition_penalty=given.get("repetition_penalty", 1.0))
    return Request(list(ids)[-(max_length - length) :], sampling, length, [stop for stop in until if stop])
