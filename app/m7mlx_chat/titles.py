"""Titles that the model writes when nothing else is asked of it, in the place of first words.

They are asked for once a conversation has its first answer, with a short prompt and a cache of
their own: the conversation's cache is left alone. Whatever is wanted next breaks that off.
"""

from __future__ import annotations

import re
from collections import Counter

from m7mlx import Request
from m7mlx_chat.events import Titled
from m7mlx_chat.store import Store
from m7mlx_chat.store.rows import TITLE_LENGTH, UNTITLED, Message, title_of

_TOLD = 600  # characters of the question, and of the answer, that the model is told
_PROMPT_TOKENS, _MOST_TOKENS = 400, 24  # about what it reads, the most that it writes
_MOST_SECONDS = 10.0  # what takes longer is not worth a title, nor the battery
_MOST_WORDS, _LONGEST_LINE = 10, 200
_ASKS = """\
Question: {question}
Answer: {answer}

Write a title of at most six words for this conversation, in its language. Write nothing but the title."""
_MARKS = re.compile(r"^(#+|[-*>•]|\d+[.)])\s+|^\W*title\W*:", re.IGNORECASE)
_QUOTES = " \t\"'`*_“”„‟«»‹›‘’‚「」『』"
# How models begin that talk about a title, or of something else.
_NO_TITLE = (
    "i ", "i'm", "i’m", "sure", "sorry", "here is", "here's", "here’s", "certainly", "of course", "as an ai",
    "the title", "a title", "write ", "question:", "answer:", "title:",
)  # fmt: skip


class Titles:
    """Which conversation is to get a title from the model."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._due: int | None = None  # a conversation that was answered, and has first words for a title
        self._asked: int | None = None  # the one whose title is being written
        self._tried: set[int] = set()

    def answered(self, conversation: int) -> None:
        """Take note of a conversation that has been answered."""
        self._due = conversation if conversation not in self._tried else self._due

    def wanted(self, model: str) -> tuple[int, Request] | None:
        """Return a conversation, and how to ask `model` for its title, if one is wanted."""
        if self._asked is not None or (conversation := self._due) is None:
            return None
        self._due = None
        head = self._store.conversation(conversation)
        is_open = head.automatic and head.deleted_at is None and head.model == model
        if not is_open or head.title != self._store.first_words(conversation):
            return None
        first = self._store.read(self._store.shown(head)[:2])
        if len(first) < 2 or not is_cheap(first[1]):
            return None
        self._asked = conversation
        return conversation, title_request(*first)

    def take(self, titled: Titled) -> None:
        """Keep a title that the model has written; one that a user chose stays as it is.

        What was broken off is asked for again.
        """
        self._asked = None
        if titled.text is None:
            self._due = self._due or titled.conversation
            return
        self._tried.add(titled.conversation)
        if title := clean_title(titled.text):
            self._store.suggest_title(titled.conversation, title)


def is_cheap(answer: Message) -> bool:
    """Whether a title takes a few seconds, by what an answer took.

    A model that thinks would not come to the title.
    """
    speeds = [answer.statistics.get(name, 0) for name in ("prompt_tps", "generation_tps")]
    if answer.thought or not answer.text or min(speeds) <= 0:
        return False
    return bool(_PROMPT_TOKENS / speeds[0] + _MOST_TOKENS / speeds[1] <= _MOST_SECONDS)


def title_request(question: Message, answer: Message) -> Request:
    """Return how to ask for the title of a conversation that begins with these two."""
    text = _ASKS.format(question=question.text[:_TOLD], answer=answer.text[:_TOLD])
    return Request([{"role": "user", "content": text}], max_tokens=_MOST_TOKENS)


def clean_title(text: str) -> str:
    """Return the title in what a model wrote, in one short line; "" where there is none."""
    line = title_of(text, _LONGEST_LINE)
    while (bare := _MARKS.sub("", line).strip(_QUOTES)) != line:
        line = bare
    line = line.rstrip(".:;,!…").rstrip(_QUOTES)
    words = line.casefold().split()
    is_short = 0 < len(words) <= _MOST_WORDS and len(line) <= TITLE_LENGTH
    says = any(c.isalnum() for c in line) and words not in ([UNTITLED.casefold()], ["title"])
    if not is_short or not says or f"{line.casefold()} ".startswith(_NO_TITLE):
        return ""
    return "" if max(Counter(words).values()) > 2 else line
