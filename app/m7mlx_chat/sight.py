"""Which messages of a conversation the model still sees.

With each answer it is stored how many tokens its prompt had, and how many had been seen at its end:
that is where messages begin and end. The next token sees the last `window` positions directly; what
lies before reaches it only through what later tokens made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from m7mlx_chat.events import Ready
from m7mlx_chat.store.rows import Message

_PAGE = 50  # messages to read at a time


def first_seen(
    line: Sequence[int],
    read: Callable[[Sequence[int]], Sequence[Message]],
    ready: Ready | None,
) -> int:
    """Find the first message of a line of which the next token sees anything; return its index.

    read  gives the messages of some ids

    Messages whose ends are not known count as ending where the next one does that is: what may be
    seen is taken to be. Sinks, the first few tokens of all, are not counted as seen.
    """
    if ready is None or ready.window is None:
        return 0
    unseen: int | None = None  # positions from the first one on
    end: int | None = None  # of the message looked at, as far as that is known
    for last in range(len(line), 0, -_PAGE):
        first = max(0, last - _PAGE)
        for message in reversed(read(line[first:last])):
            seen, prompt = _ends(message, ready.vocabulary)
            if unseen is None and seen is not None:
                unseen = seen - (ready.window - ready.sinks) + 1
                if unseen <= 0:
                    return 0
            end = seen if seen is not None else end
            if unseen is not None and end is not None and end <= unseen:
                return line.index(message.id, first) + 1
            end = prompt if prompt is not None else end
    return 0


def _ends(message: Message, vocabulary: str) -> tuple[int | None, int | None]:
    """Where an answer ends, and where its question does, in tokens of a vocabulary."""
    found = message.statistics
    if message.role != "assistant" or found.get("vocabulary") != vocabulary:
        return None, None
    seen, prompt = found.get("seen"), found.get("prompt_tokens")
    return (seen if type(seen) is int else None), (prompt if type(prompt) is int else None)
