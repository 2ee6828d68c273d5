"""What the model no longer sees is dimmed, to the token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from chat_harness import READY, Chat, chatting
from hypothesis import given
from hypothesis import strategies as st
from m7mlx_chat.sight import first_seen
from m7mlx_chat.store.rows import Message
from textual.widgets import Static


def messages(lengths: Sequence[tuple[int, int]], known: Sequence[bool]) -> list[Message]:
    """Questions and answers of so many tokens each; of some answers the figures are known."""
    found: list[Message] = []
    end = 0
    for (question, answer), is_known in zip(lengths, known, strict=True):
        figures = {"prompt_tokens": end + question, "seen": end + question + answer, "vocabulary": "v"}
        for role, statistics in (("user", {}), ("assistant", figures if is_known else {})):
            found.append(
                Message(
                    parent=None,
                    role=role,  # type: ignore[arg-type]
                    text="x",
                    created=0,
                    statistics=statistics,
                    id=len(found) + 1,
                    conversation=1,
                    place=1,
                    siblings=1,
                )
            )
        end += question + answer
    return found


@given(st.data())
def test_a_message_is_out_of_sight_when_its_last_token_is(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=80))
    known = [*data.draw(st.lists(st.booleans(), min_size=len(lengths) - 1, max_size=len(lengths) - 1)), True]
    window, sinks = data.draw(st.integers(1, 100)), data.draw(st.integers(0, 4))
    line = messages(lengths, known)
    by_id = {message.id: message for message in line}
    ready = replace(READY, window=window + sinks, sinks=sinks)
    first = first_seen([m.id for m in line], lambda ids: [by_id[i] for i in ids], ready)
    ends: list[int | None] = []
    end = 0
    for (question, answer), is_known in zip(lengths, known, strict=True):
        ends += [end + question, end + question + answer] if is_known else [None, None]
        end += question + answer
    following = end  # of the message, or of the next one whose end is known
    expected = 0
    for index in reversed(range(len(line))):
        following = ends[index] or following
        # The next token, at position `end`, sees end - window + 1 … end.
        if following - 1 < end - window + 1:
            expected = index + 1
            break
    assert first == expected
    assert first_seen([m.id for m in line], lambda ids: [], replace(ready, window=None)) == 0


def dimmed(chat: Chat) -> list[bool]:
    return [view.has_class("-unseen") for view in chat.app.transcript.views]


async def test_what_is_out_of_sight_is_dimmed_and_said(tmp_path: Path) -> None:
    ready = replace(READY, window=100)
    async with chatting(tmp_path, ready=False) as chat:
        await chat.say(ready)
        await chat.exchange("one", "answer one", prompt_tokens=10, seen=40)
        await chat.exchange("two", "answer two", prompt_tokens=60, seen=90)
        assert dimmed(chat) == [False] * 4 and "above" not in chat.shown()
        await chat.exchange("three", "answer three", prompt_tokens=100, seen=150)
        assert dimmed(chat) == [True, True, False, False, False, False]  # of answer two something is seen
        lines = chat.shown().splitlines()
        (hint,) = [i for i, text in enumerate(lines) if "above: no longer seen by the model" in text]
        assert any("answer one" in text for text in lines[:hint])
        assert not any("answer two" in text for text in lines[:hint])
        await chat.app.action_new()
        await chat.pilot.pause()
        assert dimmed(chat) == [] and "above" not in chat.shown()
        await chat.app.open_conversation(1)
        await chat.pilot.pause()
        assert dimmed(chat)[:3] == [True, True, False]
        await chat.say(replace(ready, window=None))  # a model that sees all
        assert not any(dimmed(chat)) and "above" not in chat.shown()
        await chat.say(replace(ready, window=54, sinks=4))
        assert dimmed(chat) == [True] * 5 + [False] and "but for its first 4 tokens" in chat.shown()


async def test_a_long_conversation_is_dimmed_page_by_page(tmp_path: Path) -> None:
    async with chatting(tmp_path, ready=False) as chat:
        await chat.say(replace(READY, window=100))
        for i in range(30):
            asked = chat.store.ask(None if i == 0 else 1, 2 * i or None, f"question {i}")
            figures = {"prompt_tokens": 20 * i + 10, "seen": 20 * i + 20, "vocabulary": "v"}
            chat.store.finish(asked.answer, "complete", f"answer {i}", figures, [7])
        await chat.app.open_conversation(1)
        await chat.pilot.pause()
        assert dimmed(chat) == [True] * 10 + [False] * 10  # the last 20; question 25 is the first seen
        assert "above: no longer seen" in str(chat.app.query_one("#horizon", Static).content)
        await chat.pilot.press("ctrl+home")
        await chat.pilot.pause()
        assert dimmed(chat) and all(dimmed(chat)) and not chat.app.query_one("#horizon").display
        await chat.pilot.press("ctrl+end")
        await chat.pilot.pause()
        assert dimmed(chat)[-20:] == [True] * 10 + [False] * 10
