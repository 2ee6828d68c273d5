"""A branch of a conversation as the model is given it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m7mlx_chat.steps import messages_of
from m7mlx_chat.store.rows import Message


def history(branch: Sequence[Message], system: str, vocabulary: str | None) -> list[dict[str, Any]]:
    """The messages of a branch for the model, without questions that have no answer, but the last.

    An answer comes with its token ids where the model of now, named by its `vocabulary`, reads them
    as the same text.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message, following in zip(branch, [*branch[1:], None], strict=True):
        unanswered = following is not None and following.role == "assistant" and not _says(following)
        if message.role == "user" and not unanswered:
            messages.append({"role": "user", "content": message.text})
        elif message.role == "assistant" and _says(message):
            messages += messages_of(message.steps)
            if not message.text:
                continue
            ids = ids_for(message, vocabulary)
            known = {} if ids is None else {"ids": ids}
            messages.append({"role": "assistant", "content": message.text} | known)
    return messages


def _says(answer: Message) -> bool:
    return bool(answer.text or answer.steps)


def ids_for(message: Message, vocabulary: str | None) -> list[int] | None:
    """The token ids of an answer, if they are known and mean the same in a vocabulary."""
    ours = vocabulary is not None and message.statistics.get("vocabulary") == vocabulary
    return message.ids if ours else None
