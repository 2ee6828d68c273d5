"""Versions and branches: edit, answer again, go on, fork; by keys and by commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_harness import READY, Chat, chatting, done
from m7mlx_chat.events import Text
from m7mlx_chat.settings import Settings
from m7mlx_chat.widgets.message_parts import Versions
from m7mlx_chat.widgets.messages import Answer
from textual.widgets import Static


def versions(chat: Chat) -> list[str]:
    return [str(w.content) for w in chat.app.query(Versions)]


def said(chat: Chat, number: int = -1) -> list[str]:
    return [m["content"] for m in chat.engine.messages(number)]


async def two_turns(chat: Chat) -> None:
    await chat.exchange("one", "first")
    await chat.exchange("two", "second")


@pytest.mark.parametrize("by_key", [True, False])
async def test_an_edited_question_is_another_branch(tmp_path: Path, by_key: bool) -> None:
    async with chatting(tmp_path) as chat:
        await two_turns(chat)
        if by_key:
            await chat.pilot.press("alt+up", "alt+up", "e")
        else:
            await chat.send("/edit")
        assert chat.app.composer.text == "two"
        assert "editing" in str(chat.app.composer.border_title)
        await chat.pilot.press("!", "enter")
        await chat.pilot.pause()
        assert said(chat) == ["one", "first", "two!"]
        await chat.say(done("other"))
        assert chat.line() == ["one", "first", "two!", "other"]
        assert versions(chat) == ["‹ 2/2 ›"]
        await chat.pilot.press("alt+up", "alt+up", "left_square_bracket")
        await chat.pilot.pause()
        assert chat.line() == ["one", "first", "two", "second"]
        assert versions(chat) == ["‹ 1/2 ›"]
        await chat.pilot.press("right_square_bracket")  # the message is still selected
        await chat.pilot.pause()
        assert chat.line() == ["one", "first", "two!", "other"]
        await chat.pilot.press("right_square_bracket")  # there is no further one
        assert chat.line() == ["one", "first", "two!", "other"]


async def test_an_edited_answer_is_another_version_and_can_be_gone_on_with(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await two_turns(chat)
        await chat.pilot.press("alt+up", "e")
        assert chat.app.composer.text == "second"
        assert "editing an answer" in str(chat.app.composer.border_title)
        await chat.pilot.press("escape")
        assert chat.app.composer.text == "" and chat.line()[-1] == "second"
        await chat.pilot.press("alt+up", "e", *"s, but", "enter")
        await chat.pilot.pause()
        assert chat.line() == ["one", "first", "two", "seconds, but"]
        assert versions(chat) == ["‹ 2/2 ›"] and len(chat.engine.asked) == 2  # nobody was asked
        assert "written by you" in chat.shown() and chat.app.composer.text == ""
        await chat.send("three")
        assert said(chat) == ["one", "first", "two", "seconds, but", "three"]
        await chat.say(done("third"))
        await chat.pilot.press("alt+up", "alt+up", "alt+up", "left_square_bracket")
        await chat.pilot.pause()
        assert chat.line() == ["one", "first", "two", "second"]
        await chat.pilot.press("right_square_bracket", "f")
        await chat.pilot.pause()
        await chat.send("/continue")
        assert chat.engine.asked[-1].continues == "seconds, but"
        await chat.say(Text(" more"), done(" more"))
        assert chat.line() == ["one", "first", "two", "seconds, but more"]


async def test_the_beginning_of_an_answer_can_be_given(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("/begin Well")
        assert "nothing has been asked yet" in chat.notices()
        await two_turns(chat)
        await chat.send("/begin")
        assert "/begin needs the words" in chat.notices()
        await chat.send("/begin Well, yes:")
        assert said(chat) == ["one", "first", "two"] and chat.engine.asked[-1].continues == "Well, yes:"
        await chat.send("/begin No")
        assert "still answering" in chat.notices()
        await chat.say(Text(" it is"), done(" it is"))
        assert chat.line() == ["one", "first", "two", "Well, yes: it is"]
        assert versions(chat) == ["‹ 2/2 ›"]


async def test_the_answer_under_way_cannot_be_edited(tmp_path: Path) -> None:
    """Others can, and are kept once the model has ended."""
    async with chatting(tmp_path) as chat:
        await two_turns(chat)
        await chat.send("three")
        await chat.say(Text("thi"))
        await chat.pilot.press("alt+up", "e")
        assert "still answering" in chat.notices() and chat.app.drafts.edited is None
        await chat.pilot.press("alt+up", "alt+up", "e", "!", "enter")
        await chat.pilot.pause()
        assert chat.app.composer.text == "second!"  # not lost
        await chat.say(done("third"))
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert chat.line() == ["one", "first", "two", "second!"]


async def test_escape_leaves_a_question_as_it_is(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await two_turns(chat)
        await chat.send("/edit")
        await chat.pilot.press("escape")
        assert chat.app.composer.text == ""
        await chat.send("three")
        assert said(chat) == ["one", "first", "two", "second", "three"]


async def test_the_first_question_can_be_edited_too(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await two_turns(chat)
        for _ in range(4):
            await chat.pilot.press("alt+up")
        await chat.pilot.press("e", "!", "enter")
        await chat.pilot.pause()
        assert said(chat) == ["one!"]
        await chat.say(done("new"))
        assert chat.line() == ["one!", "new"]
        assert len(chat.store.conversations()) == 1


@pytest.mark.parametrize("how", ["key", "command", "of the question"])
async def test_another_answer(tmp_path: Path, how: str) -> None:
    async with chatting(tmp_path) as chat:
        await two_turns(chat)
        if how == "command":
            await chat.send("/retry")
        else:
            await chat.pilot.press(*["alt+up"] * (2 if how == "of the question" else 1), "r")
            await chat.pilot.pause()
        assert said(chat) == ["one", "first", "two"]
        await chat.say(Text("another"), done("another"))
        assert chat.line() == ["one", "first", "two", "another"]
        assert versions(chat) == ["‹ 2/2 ›"]
        await chat.pilot.click(Versions, offset=(1, 0))
        await chat.pilot.pause()
        assert chat.line()[-1] == "second"


async def test_an_earlier_answer_again_starts_a_branch_there(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await two_turns(chat)
        await chat.pilot.press("alt+up", "alt+up", "alt+up", "r")
        await chat.pilot.pause()
        assert said(chat) == ["one"]
        await chat.say(done("first again"))
        assert chat.line() == ["one", "first again"]
        await chat.pilot.press("alt+up", "left_square_bracket")
        await chat.pilot.pause()
        assert chat.line() == ["one", "first", "two", "second"]  # with all that followed


async def test_an_answer_that_was_stopped_goes_on(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("story")
        await chat.say(Text("Once upon a"), done("Once upon a", "stopped"))
        await chat.send("/continue")
        request = chat.engine.asked[-1]
        assert said(chat) == ["story"]
        assert request.continues == [7, 7, 7]
        assert not any("stopped" in footer for footer in chat.footers())
        await chat.say(Text(" time"))
        assert chat.app.query_one(Answer).text == "Once upon a time"
        await chat.say(Text("."), done(" time."))
        assert chat.line() == ["story", "Once upon a time."]
        message = chat.store.message(chat.session.line[-1])
        assert (message.status, message.ids) == ("complete", [7] * 4)
        assert message.statistics["generated_tokens"] == 4
        assert chat.app.query_one(Answer).text == "Once upon a time."
        await chat.send("/continue")
        assert len(chat.engine.asked) == 2
        assert any("complete" in n.message for n in chat.app._notifications)


async def test_an_answer_that_a_kill_cut_short_goes_on_from_its_text(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("m7mlx_chat.answering._GROW_SECONDS", 0)
    async with chatting(tmp_path) as chat:
        await chat.send("story")
        await chat.say(Text("Once upon"))
        chat.session.under_way = None  # gone, without a word
    async with chatting(tmp_path) as chat:
        await chat.app.open_conversation(chat.store.conversations()[0].id)
        assert chat.footers()[-1] == "interrupted"
        await chat.send("/continue")
        assert chat.engine.asked[-1].continues == "Once upon"


async def test_a_fork_is_a_conversation_of_its_own(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await two_turns(chat)
        original = chat.session.conversation
        await chat.pilot.press("alt+up", "alt+up", "alt+up", "f")
        await chat.pilot.pause()
        assert chat.session.conversation != original
        assert chat.line() == ["one", "first"]
        await chat.exchange("three", "third")
        assert chat.line() == ["one", "first", "three", "third"]
        assert len(chat.store.conversations()) == 2
        await chat.send("/fork")
        assert len(chat.store.conversations()) == 3
        assert chat.line() == ["one", "first", "three", "third"]


async def test_an_answer_can_be_made_again_as_it_was(tmp_path: Path) -> None:
    async with chatting(tmp_path, settings=Settings(temperature=0.9, system="Be brief")) as chat:
        await chat.exchange("one", "first")
        first = chat.engine.asked[0]
        assert first.sampling.seed is not None
        await chat.send("/set temperature 0.1")
        await chat.send("/system off")
        await chat.send("/replay")
        assert chat.engine.asked[1] == first
        await chat.say(done("first"))
        await chat.send("/retry")
        other = chat.engine.asked[2]
        assert (other.sampling.temperature, said(chat)) == (0.1, ["one"])
        assert other.sampling.seed != first.sampling.seed


async def test_ids_of_another_tokenizer_are_not_given_to_a_model(tmp_path: Path) -> None:
    from dataclasses import replace

    async with chatting(tmp_path) as chat:
        await chat.exchange("one", "first")
        await chat.say(replace(READY, vocabulary="other"))
        await chat.send("two")
        assert all("ids" not in m for m in chat.engine.messages())


async def test_keys_of_a_selected_message_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with chatting(tmp_path) as chat:
        copied: list[Any] = []
        monkeypatch.setattr(chat.app, "copy_text", lambda text, what="": copied.append((text, what)))
        answer = "Code:\n\n```py\na = 1\n```\n\nand\n\n```\nb\n\nc\n```\n"
        await chat.exchange("code?", answer)
        await chat.pilot.press("alt+up", "c", "y", "y", "y")
        assert copied == [
            (answer, "the message"),
            ("a = 1", "code block 1 of 2"),
            ("b\n\nc", "code block 2 of 2"),
            ("a = 1", "code block 1 of 2"),
        ]
        copied.clear()
        await chat.send("/copy 2")
        await chat.send("/copy")
        await chat.send("/copy all")
        await chat.send("/copy 9")
        await chat.send("/copy nonsense")
        assert [text for text, _ in copied[:2]] == ["b\n\nc", answer]
        assert "## You" in copied[2][0]
        assert len(copied) == 3
        await chat.pilot.press("escape", "alt+up", "alt+down")
        assert chat.app.composer.has_focus


async def test_keys_select_and_escape_comes_back(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await two_turns(chat)
        await chat.pilot.press("alt+up", "alt+up")
        assert chat.app.selected is not None
        assert chat.app.selected.text == "two"
        await chat.pilot.press("escape")
        assert chat.app.composer.has_focus


def test_the_notes_below_answers() -> None:
    from m7mlx_chat.store.rows import Message
    from m7mlx_chat.widgets.messages import footer_of

    def footer(status: Any, text: str = "x", **statistics: Any) -> str:
        return footer_of(
            Message(
                id=1, conversation=1, parent=None, role="assistant", text=text, status=status, created=0.0, place=1,
                siblings=1, statistics=statistics,
            )
        )  # fmt: skip

    assert footer("complete", generated_tokens=1) == "1 token"
    assert footer("length", generated_tokens=9) == "cut at the longest length · 9 tokens"
    assert footer("interrupted") == "interrupted"
    assert footer("answering") == "being answered in another window"
    assert footer("error", error="no memory") == "failed on the way"
    assert Static(footer("stopped")).content == "stopped before the first word"
