"""What is said, between the store and a scripted engine, without an interface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from chat_harness import READY, ScriptedEngine, done
from m7mlx_chat.answering import Busy
from m7mlx_chat.events import Failed, Seen, Text
from m7mlx_chat.session import Session
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import Store
from m7mlx_chat.store.errors import StoreError

from m7mlx.errors import InputError


class Speaker:
    """One instance of the program: its session, and what its engine was asked."""

    def __init__(self, database: Path, *, ready: bool = True, **settings: Any) -> None:
        self.engine = ScriptedEngine()
        self.store = Store(database)
        self.session = Session(self.store, self.engine, Settings(model="m", **settings))
        if ready:
            self.session.handle(READY)

    def exchange(self, question: str, answer: str) -> None:
        self.session.ask(question)
        self.session.handle(done(answer))

    @property
    def texts(self) -> list[str]:
        return [message.text for message in self.store.read(self.session.line)]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "chats.db"


@pytest.fixture
def speaker(database: Path) -> Iterator[Speaker]:
    speaker = Speaker(database)
    yield speaker
    speaker.store.close()


def test_the_question_is_kept_before_the_engine_hears_it(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(_: object) -> None:
        (conversation,) = speaker.store.conversations()
        question, answer = speaker.store.read(speaker.store.line(cast(int, conversation.leaf)))
        assert (question.text, answer.status) == ("hello", "answering")

    monkeypatch.setattr(speaker.engine, "submit", submit)
    speaker.session.ask("hello")
    assert speaker.session.under_way is not None


def test_what_is_said_is_kept_within_a_second(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = speaker.session.ask("hello")
    now = under_way.saved
    monkeypatch.setattr("m7mlx_chat.answering.time.monotonic", lambda: now)
    speaker.session.handle(Text("one ", 1, Seen(5, 100)))
    assert speaker.store.message(under_way.answer).text == ""
    now += 0.99
    speaker.session.handle(Text("two", 1, Seen(6, 100)))
    assert speaker.store.message(under_way.answer).text == "one two"
    now += 0.1
    speaker.session.handle(Text(" three", 1, None))
    # as shown, ahead of what is kept
    assert speaker.session.message(under_way.answer).text == "one two three"
    assert speaker.session.seen == Seen(6, 100)


@pytest.mark.parametrize("ready", [True, False])
def test_a_store_that_cannot_be_read_frees_the_next_question(
    database: Path, monkeypatch: pytest.MonkeyPatch, ready: bool
) -> None:
    def fail(*_: object) -> None:
        raise StoreError("damaged")

    speaker = Speaker(database, ready=ready)
    with monkeypatch.context() as broken:
        broken.setattr(speaker.store, "branch", fail)
        if not ready:
            speaker.session.ask("hello")
        with pytest.raises(StoreError, match="damaged"):
            speaker.session.ask("hello") if ready else speaker.session.handle(READY)
    assert speaker.session.under_way is None and not speaker.engine.asked
    (conversation,) = speaker.store.conversations()
    assert speaker.store.message(cast(int, conversation.leaf)).status == "error"
    speaker.exchange("again", "Here.")
    assert len(speaker.engine.asked) == 1
    speaker.store.close()


def test_one_answer_at_a_time(speaker: Speaker) -> None:
    speaker.exchange("one", "first")
    speaker.session.ask("two")
    line = list(speaker.session.line)
    for again in (
        lambda: speaker.session.ask("three"),
        lambda: speaker.session.edit(line[0], "other"),
        lambda: speaker.session.retry(),
        lambda: speaker.session.resume(),
        lambda: speaker.session.replay(line[1]),
    ):
        with pytest.raises(Busy):
            again()
    assert speaker.session.line == line and len(speaker.engine.asked) == 2


def test_what_can_only_be_done_to_what_was_said(speaker: Speaker) -> None:
    with pytest.raises(InputError, match="nothing has been asked"):
        speaker.session.retry()
    with pytest.raises(InputError, match="nothing to go on with"):
        speaker.session.resume()
    speaker.exchange("one", "first")
    with pytest.raises(InputError, match="nothing to go on with"):
        speaker.session.resume()
    assert len(speaker.engine.asked) == 1


def test_a_question_that_failed_does_not_stand_in_the_way_of_the_next(speaker: Speaker) -> None:
    speaker.exchange("one", "first")
    speaker.session.ask("far too long")
    speaker.session.handle(Failed("the prompt has 20000 tokens", fatal=False, exit_status=2))
    speaker.exchange("two", "second")
    said = [(m["role"], m["content"]) for m in speaker.engine.messages()]
    assert said == [("user", "one"), ("assistant", "first"), ("user", "two")]
    # it is still there to see
    assert speaker.texts == ["one", "first", "far too long", "", "two", "second"]


def test_an_answer_waits_for_its_model(database: Path) -> None:
    speaker = Speaker(database, ready=False)
    with speaker.store:
        speaker.session.ask("one")
        assert speaker.engine.asked == []
        speaker.session.handle(READY)
        assert [m["content"] for m in speaker.engine.messages(0)] == ["one"]
        speaker.session.handle(done("first"))
        assert speaker.texts == ["one", "first"]


def test_sampled_answers_have_a_seed_and_can_be_made_again(database: Path) -> None:
    speaker = Speaker(database, temperature=0.8, system="Be brief.")
    with speaker.store:
        speaker.exchange("one", "first")
        first = speaker.engine.asked[-1]
        assert first.sampling.seed is not None
        speaker.session.configure(replace(speaker.session.settings, temperature=0.1, system="", stop=("x",)))
        speaker.session.replay(speaker.session.line[-1])
        assert speaker.engine.asked[-1] == first
        speaker.session.handle(done("first"))
        speaker.session.retry()
        assert speaker.engine.asked[-1].sampling.temperature == 0.1
        assert speaker.engine.asked[-1].sampling.seed not in (None, first.sampling.seed)


def test_settings_belong_to_their_conversation(speaker: Speaker) -> None:
    speaker.exchange("one", "first")
    one = cast(int, speaker.session.conversation)
    speaker.session.configure(replace(speaker.session.settings, temperature=0.5, system="Rhyme.", kv_bits=8))
    speaker.session.new()
    assert (speaker.session.settings.temperature, speaker.session.settings.system) == (0, "")
    assert speaker.session.settings.kv_bits == 8  # the engine's, and there is one engine
    speaker.session.open(one)
    assert (speaker.session.settings.temperature, speaker.session.settings.system) == (0.5, "Rhyme.")


def test_a_switch_at_the_end_goes_nowhere(speaker: Speaker) -> None:
    speaker.exchange("one", "first")
    speaker.session.retry()
    speaker.session.handle(done("other"))
    answer = speaker.session.line[-1]
    speaker.session.switch(answer, 1)
    assert speaker.texts == ["one", "other"]
    speaker.session.switch(answer, -1)
    assert speaker.texts == ["one", "first"]
    speaker.session.switch(speaker.session.line[-1], -1)
    assert speaker.texts == ["one", "first"]


# --- two instances on one database ----------------------------------------------------------------


def test_two_instances_speak_in_one_conversation_without_hurting_each_other(speaker: Speaker, database: Path) -> None:
    speaker.exchange("one", "first")
    conversation = cast(int, speaker.session.conversation)
    other = Speaker(database)
    with other.store:
        other.session.open(conversation)
        speaker.store.changed_elsewhere()  # from here on
        ours, theirs = speaker.session.ask("ours"), other.session.ask("theirs")
        with pytest.raises(StoreError):  # it is under way over there
            speaker.store.resume(theirs.answer)
        speaker.session.handle(done("our answer"))
        other.session.handle(done("their answer"))
        assert speaker.texts == ["one", "first", "ours", "our answer"]
        assert other.texts == ["one", "first", "theirs", "their answer"]
        assert speaker.store.changed_elsewhere()
        assert [m.id for m in speaker.store.siblings(ours.question)] == [ours.question, theirs.question]
        speaker.session.show(theirs.answer)
        assert speaker.texts == other.texts


def test_an_answer_cut_short_elsewhere_can_be_gone_on_with_when_that_instance_is_gone(
    speaker: Speaker,
    database: Path,
) -> None:
    other = Speaker(database)
    under_way = other.session.ask("one")
    other.store.grow(under_way.answer, "once upon")
    speaker.session.open(under_way.conversation)
    with pytest.raises(InputError):
        speaker.session.resume()
    other.store.close()
    left = speaker.store.message(under_way.answer)
    assert (left.text, left.status) == ("once upon", "interrupted")
    speaker.session.resume()
    # a text alone: its ids were never known
    assert speaker.engine.asked[-1].continues == "once upon"
    speaker.session.handle(done(" a time"))
    assert speaker.texts == ["one", "once upon a time"]
    assert speaker.store.message(under_way.answer).status == "complete"
