"""Where a conversation has no more room, or an answer would be the same: it is said and offered."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_harness import READY, Chat, chatting, done
from m7mlx_chat.events import Failed, Text
from m7mlx_chat.screens.dialogs import Choose
from m7mlx_chat.session import SAMPLED
from m7mlx_chat.settings import Settings
from textual.widgets._markdown import MarkdownFence

FULL = Failed("the prompt has 9000 tokens, but the model's context holds 8192", exit_status=2, room=8192)


async def full(chat: Chat) -> None:
    await chat.exchange("first", "the first answer")
    await chat.send("too much")
    await chat.say(FULL)
    assert isinstance(chat.app.screen, Choose)
    assert "8,192" in chat.shown()


async def test_it_goes_on_with_a_sliding_window(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await full(chat)
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert chat.engine.loaded[-1][1].max_kv_size == 8192
        await chat.say(READY)
        assert [m["content"] for m in chat.engine.messages()] == ["first", "the first answer", "too much"]
        await chat.say(done("fits"))
        assert chat.line() == ["first", "the first answer", "too much", "fits"]


async def test_a_summary_or_a_new_conversation_takes_its_place(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await full(chat)
        await chat.pilot.press("down", "enter")
        await chat.pilot.pause()
        (asked,) = chat.engine.messages()
        assert asked["content"].startswith("Sum up") and "You: the first answer" in asked["content"]
        assert chat.app.composer.text == "too much"
        await chat.say(done("a summary"))
        await chat.send("x")
        await chat.say(FULL)
        await chat.pilot.press("down", "down", "enter")
        await chat.pilot.pause()
        assert chat.line() == []
        assert chat.app.composer.text == "too muchx"
        assert len(chat.store.conversations()) == 2


async def test_a_continuation_without_room_says_so(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("story")
        await chat.say(Text("Once"), done("Once", "length"))
        assert len(chat.app.screen_stack) == 1
        await chat.send("/continue")
        await chat.say(done("", "length"))
        assert isinstance(chat.app.screen, Choose)
        await chat.pilot.press("escape")
        await chat.send("/continue")
        await chat.say(FULL)
        await chat.pilot.press("enter")
        await chat.say(READY)
        assert chat.engine.asked[-1].continues == [7]


async def test_another_answer_at_temperature_0_is_another_one(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("question")
        await chat.say(done("half an", "stopped"))
        await chat.send("/retry")
        assert chat.engine.asked[-1].sampling.temperature == 0  # it was stopped: this is the whole one
        await chat.say(done("half an answer"))
        await chat.send("/retry")
        sampling = chat.engine.asked[-1].sampling
        assert sampling.temperature == SAMPLED and sampling.seed is not None
        assert f"sampled at {SAMPLED}" in chat.notices()
        await chat.say(done("another"))
        await chat.send("/set temperature 0.3")
        await chat.send("/retry")
        assert chat.engine.asked[-1].sampling.temperature == 0.3
    async with chatting(tmp_path, settings=Settings(model="other")) as chat:
        await chat.app.open_conversation(1)
        await chat.send("/set temperature 0")
        await chat.send("/retry")
        assert chat.engine.asked[-1].sampling.temperature == 0  # another model says something else


@pytest.mark.parametrize("pieces", [["pass\n```\n\nthe end"], ["pass", "\n", "``", "`\n\nthe ", "end"]])
async def test_what_goes_on_inside_a_code_block_stays_in_it(tmp_path: Path, pieces: list[str]) -> None:
    async with chatting(tmp_path) as chat:
        begun = "Look:\n\n```python\nfor x in y:\n\n    "
        await chat.send("code?")
        await chat.say(Text(begun), done(begun, "stopped"))
        await chat.send("/continue")
        for piece in pieces:
            await chat.say(Text(piece))
        await chat.pilot.pause()
        (fence,) = chat.app.query(MarkdownFence)
        assert fence.code.rstrip() == "for x in y:\n\n    pass"
        assert [str(w.content) for w in chat.app.query("MarkdownParagraph")] == ["Look:", "the end"]  # type: ignore[attr-defined]
        await chat.say(done("".join(pieces)))
        (fence,) = chat.app.query(MarkdownFence)
        assert fence.code.rstrip() == "for x in y:\n\n    pass"
