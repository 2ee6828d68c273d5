"""Several prompts → their answers, made side by side by the scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from m7mlx.cache import RollingCache
from m7mlx.errors import InputError
from m7mlx.memory import positions_that_fit
from m7mlx.model import Mistral
from m7mlx.prompt import Prompt
from m7mlx.request import Request, kind_of, prepare
from m7mlx.sampling import Sampling
from m7mlx.scheduler import Scheduler
from m7mlx.tokens.messages import Message
from m7mlx.tokens.tokenizer import Tokenizer

Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Sequence[Sequence[Message]] | list[Prompt]
_TAKEN = ("sampling", "max_tokens", "stop", "logits_processors")  # options that are every answer's
_ROWS = 8


def is_several(prompt: object) -> bool:
    """Tell whether `prompt` is a list of prompts; one prompt's first item is an id or a message.

    Raises InputError for a list of prompts that holds something else.
    """
    if not isinstance(prompt, list | tuple) or not prompt or not _is_whole(prompt[0]):
        return False
    for item in prompt:
        if not _is_whole(item):
            raise InputError(
                "a list of prompts holds whole prompts (texts, lists of ids, lists of messages), "
                f"but one item is of kind {kind_of(item)}"
            )
    return True


def _is_whole(item: object) -> bool:
    """Whether an item of a list can be a prompt of its own."""
    return isinstance(item, str | list | tuple | mx.array | np.ndarray) and getattr(item, "ndim", 1) > 0


def generate_all(
    model: Mistral, tokenizer: Tokenizer, prompts: Sequence[Any], options: Mapping[str, Any]
) -> list[str]:
    """Return the answers to all prompts, in their order; `options` are those of `m7mlx.generate`.

    Nothing begins before all prompts have been checked. Raises as `m7mlx.generate`, for the first
    that fails.
    """
    for name, value in options.items():
        is_given = value is not None and not (isinstance(value, Sequence) and len(value) == 0)
        if is_given and name not in _TAKEN:
            raise InputError(f"{name} belongs to one answer; with a list of prompts leave it out")
    settings = {name: value for name, value in options.items() if name in _TAKEN}
    settings["sampling"] = settings.get("sampling") or Sampling()
    empty = model.new_cache()
    ready = [prepare(Request(prompt, **settings), model, tokenizer, empty) for prompt in prompts]
    rows, kept = _that_fit(model, ready, empty)
    scheduler = Scheduler(model, tokenizer, rows=rows, kept=kept)
    numbers = {scheduler.admit(request): i for i, request in enumerate(ready)}
    texts = [""] * len(prompts)
    goes_on = True
    while goes_on:
        told, goes_on = scheduler.step()
        for number, piece in told:
            if piece.error is not None:
                raise piece.error
            texts[numbers[number]] += piece.text
    return texts


def _that_fit(model: Mistral, ready: Sequence[Request], empty: RollingCache) -> tuple[int, int]:
    """Return how many of the requests to answer at a time, and how many conversations to keep.

    With a window, each takes little; else what is kept takes as much memory as a row.
    """
    rows, kept = min(_ROWS, len(ready)), 1
    if empty.window is not None:
        return rows, kept
    fit = positions_that_fit(model.config, model.nbytes, empty.format.stored_bits(model.dtype))
    longest = max(len(request.ids) + (request.max_tokens or 0) for request in ready)
    # All processes that share a model must answer the same ones together.
    together = int(np.array(model.agree(mx.array(min(fit // longest, rows + kept)))))
    return max(1, min(rows, together - kept)), kept if together > kept else 0
