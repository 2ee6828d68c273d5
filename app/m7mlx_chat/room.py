"""The ways out of a conversation that has become longer than the model can see at once."""

from __future__ import annotations

from m7mlx.units import counted
from m7mlx_chat.store import Store

_CHARACTERS = 2  # of a token, at the least: so much of the conversation is summed up
_SUMMARY = "Sum up the conversation below in at most 300 words, so that it can be gone on with.\n\n"
WAYS = {
    "slide": "Go on here: the model keeps the beginning and the latest part in sight, and loses the middle",
    "sum up": "Sum up: a new conversation begins with a summary of this one; your question follows",
    "anew": "Begin anew: your question alone, in a new conversation",
}


def is_full(room: int) -> str:
    """Say that a conversation has outgrown the `room` tokens that the model sees at once."""
    return f"This conversation is full: the model can see {counted(room, 'token')} at once. How shall it go on?"


def summary_request(store: Store, question: int, room: int) -> str:
    """Ask for a summary of all that was said before a question; the last part of it that fits."""
    parent = store.message(question).parent
    said = store.branch(parent) if parent is not None else []
    whole = "\n\n".join(f"{'I' if m.role == 'user' else 'You'}: {m.text}" for m in said if m.text)
    return _SUMMARY + whole[-room * _CHARACTERS :]
