"""What a model thinks: folded on the screen, kept with the answer, and no part of it."""

from __future__ import annotations

from pathlib import Path

from chat_harness import Chat, chatting, done
from m7mlx_chat.engine import Engine
from m7mlx_chat.events import Done, Event, Failed, Text, Thought
from m7mlx_chat.settings import Settings
from m7mlx_chat.widgets.message_parts import Thoughts
from m7mlx_chat.widgets.messages import Answer
from models import small_config, write_folder
from tekken_files import SIZE, write_tekken

from m7mlx import Request
from m7mlx.tokens.load import load_tokenizer


def folds(chat: Chat) -> list[str]:
    """The lines that thoughts are folded into, where there are some."""
    return [str(t._title.content) for t in chat.app.query(Thoughts) if t.display]


async def test_thoughts_are_folded_and_opened_by_a_key(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("6 × 7?")
        await chat.say(Thought("Hm. *Six* ", 3), Thought("sevens\x1b[2J", 5))
        assert folds(chat) == ["▸ thinking · 20 characters"]
        assert "thinking · 5 tokens" in chat.status() and "sevens" not in chat.shown()
        await chat.say(Text("42", 7), done("42"))
        assert "42" in chat.shown() and "sevens" not in chat.shown()
        await chat.pilot.press("alt+up", "t")
        await chat.pilot.pause()
        assert folds(chat) == ["▾ thinking · 20 characters"] and "Hm. *Six* sevens␛[2J" in chat.shown()
        await chat.pilot.press("t")
        await chat.pilot.pause()
        assert "sevens" not in chat.shown()
        answer = chat.session.message(chat.session.line[-1])
        assert (answer.text, answer.thought) == ("42", "Hm. *Six* sevens\x1b[2J")


async def test_they_are_there_when_a_conversation_is_opened_again(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("6 × 7?")
        await chat.say(Thought("Six sevens"), done("42"))
        await chat.send("Sure?")
        await chat.say(done("Yes"))
        assert [message["content"] for message in chat.engine.messages()] == ["6 × 7?", "42", "Sure?"]
        assert not any("reasoning_content" in message for message in chat.engine.messages())
        conversation = chat.session.conversation
        assert conversation is not None
        await chat.pilot.press("ctrl+n")
        await chat.app.open_conversation(conversation)
        await chat.pilot.pause()
        assert folds(chat) == ["▸ thinking · 10 characters"]
        await chat.pilot.press("alt+up", "t")
        await chat.pilot.pause()
        assert folds(chat) == ["▸ thinking · 10 characters"] and "Six sevens" not in chat.shown()


async def test_a_click_opens_them(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("x")
        await chat.say(Thought("Six sevens"), Failed("it broke"))
        await chat.pilot.click(".fold")
        await chat.pilot.pause()
        assert "Six sevens" in chat.shown()
        assert chat.app.query_one(Answer).message.thought == "Six sevens"


async def test_an_answer_that_goes_on_keeps_what_was_thought(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("x")
        await chat.say(Thought("Six "), Text("4"), done("4", "stopped"))
        chat.session.resume()
        await chat.say(Thought("sevens"), Text("2"), done("2"))
        answer = chat.session.message(chat.session.line[-1])
        assert (answer.text, answer.thought) == ("42", "Six sevens")


async def test_how_much_to_think_is_a_setting(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("/set reasoning_effort high")
        await chat.send("6 × 7?")
        assert chat.engine.asked[-1].effort == "high"
        await chat.say(done("42"))
        await chat.send("/set reasoning_effort off")
        await chat.send("Sure?")
        assert chat.engine.asked[-1].effort is None


def test_a_real_model_thinks(tmp_path: Path) -> None:
    """Its ids have the thoughts in them: the next prompt begins with what the cache knows."""
    folder = write_folder(tmp_path / "model", small_config(vocab_size=SIZE, n_layers=1))
    (folder / "tokenizer.model").unlink()
    think = load_tokenizer(write_tekken(folder, "v13")).control_id("[THINK]")
    assert think is not None
    engine = Engine(None)
    engine.start()
    try:
        engine.load(folder, Settings())
        engine.submit(Request([1, 3, 1100, 4], max_tokens=6, continues=[think]))
        events: list[Event] = []
        while not any(isinstance(event, Done | Failed) for event in events):
            events += engine.drain(0.5)
    finally:
        engine.close()
    (ended,) = (event for event in events if isinstance(event, Done))
    assert ended.text == "" and 1 <= len(ended.ids) <= 6
    assert any(isinstance(event, Thought) and event.text for event in events)
