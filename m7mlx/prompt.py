"""A prompt in any of its forms → the ids that a model reads, checked."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import mlx.core as mx
import numpy as np

from m7mlx.cache import RollingCache
from m7mlx.errors import InputError, PromptTooLongError, TokenizerError
from m7mlx.memory import positions_that_fit
from m7mlx.model import Mistral
from m7mlx.tokens.infill import infill_ids
from m7mlx.tokens.messages import Message
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tools.calling import call_form

Prompt = str | Sequence[int] | Sequence[Message]


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    suffix: str = "",
    effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Sequence[int]:
    """Encode a prompt in any of its three forms, a text with what stands behind the answer to it.

    effort  how much the model shall think about messages, if it is one that can be told
    tools   functions that it may call in its answer to messages

    Raises InputError and ChatFormatError.
    """
    if isinstance(prompt, str) and suffix:
        return infill_ids(tokenizer, prompt, suffix)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_bos=tokenizer.add_bos)
    if isinstance(prompt, Mapping):
        raise InputError("a message stands in a list: [{'role': …, 'content': …}]")
    if is_messages(prompt):
        told = effort if tokenizer.chat.takes_effort else None
        messages = [_joined(message) for message in prompt]
        if not tools and not any(map(_tells_of_tools, messages)):
            return tokenizer.chat.encode(messages, effort=told)
        functions = [{"type": "function", "function": dict(tool)} for tool in tools]
        return call_form(tokenizer).encode(messages, functions, False, {"effort": told, "schema": None})
    return check_ids(prompt)


def _tells_of_tools(message: Any) -> bool:
    """Whether a message calls tools, or says what one gave."""
    return isinstance(message, Mapping) and (message.get("role") == "tool" or bool(message.get("tool_calls")))


def check_ids(given: Any) -> Sequence[int]:
    """Take token ids from a list or an array of one conversation. Raises InputError for others."""
    if isinstance(given, array) and given.typecode in "iIlLqQ":
        return given  # from a server's client: a million of them would take a while to look at
    if isinstance(given, mx.array | np.ndarray):
        given = given[0] if given.ndim == 2 and len(given) == 1 else given
        given = given.tolist() if given.ndim == 1 else None
    is_list = isinstance(given, Iterable) and not isinstance(given, bytes | bytearray | memoryview | str)
    ids: list[Any] = list(given) if is_list else [None]
    if not all(isinstance(i, Integral) for i in ids) or any(isinstance(i, bool) for i in ids):
        raise InputError("a prompt is a text, a list of ids or a list of messages")
    return [int(i) for i in ids]


def check_prompt(model: Mistral, ids: Sequence[int], cache: RollingCache) -> int | None:
    """Check that a prompt fits; return how many tokens may follow it, None for no limit.

    A model with a window sets no limit. Raises InputError for no ids, TokenizerError for ids
    outside the vocabulary, PromptTooLongError.
    """
    config = model.config
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    check_known(model, ids)
    if cache.window is not None:
        return None
    bits = cache.format.stored_bits(model.dtype)
    fit, context = positions_that_fit(config, model.nbytes, bits), config.max_position_embeddings
    if len(ids) > min(fit, context):
        what = f"the model's context holds {context}" if context <= fit else f"memory holds {fit} beside the model"
        raise PromptTooLongError(
            f"the prompt has {len(ids)} tokens, but {what}; "
            "shorten it, start a new conversation, or bound the cache with max_kv_size",
            min(fit, context),
            len(ids),
        )
    return min(fit, context) - len(ids)


def check_known(model: Mistral, ids: Sequence[int]) -> None:
    """Raise TokenizerError for ids outside the model's vocabulary."""
    found = np.asarray(ids)  # without a copy of those that a server reads
    beyond = np.flatnonzero((found < 0) | (found >= model.config.vocab_size))
    if beyond.size:  # it would read memory that is not the model's
        token = ids[int(beyond[0])]
        raise TokenizerError(f"token id {token} is outside the model's vocabulary of {model.config.vocab_size}")


def is_messages(prompt: Any) -> bool:
    """Whether a prompt is chat messages."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _joined(message: Any) -> Any:
    """A message whose content, if it is a list of text parts, is their text."""
    parts = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(parts, list):
        return message
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise InputError("the parts of a message must be of type text: this model reads nothing else")
    return {**message, "content": "".join(map(str, texts))}
