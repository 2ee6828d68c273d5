"""Versions beside each other; the same question to another model."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_harness import READY, Chat, chatting, done
from hypothesis import given
from hypothesis import strategies as st
from m7mlx_chat.differences import differences
from m7mlx_chat.events import Failed, Text
from m7mlx_chat.screens.model_work import Chosen
from m7mlx_chat.screens.models import Models
from m7mlx_chat.screens.versions import SideBySide

TEXTS = st.lists(st.sampled_from(["one", "two", " ", "\n", ".", "é", "👩‍👧"]), max_size=12).map("".join)


@given(TEXTS, TEXTS)
def test_both_texts_are_there_and_what_is_marked_is_all_that_differs(before: str, after: str) -> None:
    left, right = differences(before, after)
    assert (left.plain, right.plain) == (before, after)

    def unmarked(text: object) -> str:
        spans = text.spans  # type: ignore[attr-defined]
        plain = text.plain  # type: ignore[attr-defined]
        return "".join(c for i, c in enumerate(plain) if not any(s.start <= i < s.end for s in spans))

    assert unmarked(left) == unmarked(right)


def test_long_texts_are_compared_by_lines() -> None:
    lines = [f"line {i} of them\n" for i in range(3000)]
    left, right = differences("".join(lines), "".join(["new\n", *lines[:1000], *lines[1001:]]))
    assert [left.plain[s.start : s.end] for s in left.spans if s.style] == [lines[1000]]
    assert [right.plain[s.start : s.end] for s in right.spans if s.style] == ["new\n"]


async def several(chat: Chat) -> None:
    await chat.exchange("question", "the first answer")
    for text in ("the second answer", "a third one"):
        await chat.send("/retry")
        await chat.say(done(text))


async def test_versions_beside_each_other(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(110, 30)) as chat:
        await several(chat)
        await chat.pilot.press("alt+up", "v")
        await chat.settled()
        assert isinstance(chat.app.screen, SideBySide)
        assert "the second answer" in chat.shown() and "a third one" in chat.shown()
        assert "‹2/3› · a[b]/model" in chat.shown()
        await chat.pilot.press("left_square_bracket")
        await chat.settled()
        assert "the first answer" in chat.shown() and "the second answer" not in chat.shown()
        await chat.pilot.press("left_square_bracket", "d")  # round, past the one on the right
        await chat.settled()
        assert "the second answer" in chat.shown() and "a third one" in chat.shown()
        await chat.pilot.press("1")
        await chat.settled()
        assert chat.line() == ["question", "the second answer"]
        await chat.pilot.press("alt+up", "alt+up", "v")
        await chat.settled()
        assert "one version only" in chat.notices()


@pytest.mark.parametrize("size", [(20, 5), (40, 12), (300, 100)])
async def test_in_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    async with chatting(tmp_path, size=size) as chat:
        await several(chat)
        await chat.pilot.press("alt+up", "v", "d", "escape")
        await chat.settled()
        assert len(chat.app.screen_stack) == 1 and chat.app._undrawn == 0


async def asked_other(chat: Chat, command: str = "/compare") -> None:
    """Answer, ask for a comparison, choose `other` in the list of models."""
    await chat.exchange("question", "its answer")
    await chat.send(command)
    assert isinstance(chat.app.screen, Models)
    chat.app.screen.dismiss(Chosen("other", Path("/models/other")))
    await chat.pilot.pause()


def loaded(chat: Chat) -> list[str]:
    return [folder.name for folder, _ in chat.engine.loaded]


async def test_another_model_answers_too_and_the_first_comes_back(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(110, 30)) as chat:
        await asked_other(chat)
        assert loaded(chat) == ["small", "other"]
        assert len(chat.engine.asked) == 1
        await chat.say(READY, Text("others"))
        assert [m["content"] for m in chat.engine.messages()] == ["question"]
        await chat.say(done("others say so"))
        await chat.settled()
        assert loaded(chat) == ["small", "other", "small"]
        assert "its answer" in chat.shown() and "others say so" in chat.shown()
        assert "1  ‹1/2› · a[b]/model" in chat.shown() and "2  ‹2/2› · other" in chat.shown()
        await chat.say(READY)
        await chat.pilot.press("1")
        await chat.settled()
        assert chat.line() == ["question", "its answer"]
        assert chat.session.settings.model == "a[b]/model"
        assert chat.store.conversations()[0].model == "a[b]/model"


async def test_what_fails_or_is_left_brings_the_first_model_back(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("/compare")
        assert "there is no answer yet" in chat.notices()
        await asked_other(chat)
        await chat.say(Failed("other is damaged", fatal=True))
        assert loaded(chat) == ["small", "other", "small"]
        assert "other is damaged" in chat.notices()
        assert len(chat.app.screen_stack) == 1
        await chat.say(READY)
        await chat.send("/compare")
        await chat.pilot.press("escape")
        await chat.pilot.pause()
        assert len(chat.app.screen_stack) == 1
        await chat.exchange("go on", "gladly")
        assert chat.line()[-1] == "gladly"
        assert loaded(chat) == ["small", "other", "small"]
