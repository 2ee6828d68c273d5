"""Where the user writes: lines, pastes, files, completion, history."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from chat_harness import Chat, chatting
from m7mlx_chat.completing import paths
from m7mlx_chat.environment import read_environment
from m7mlx_chat.events import Failed
from m7mlx_chat.screens.dialogs import Search
from m7mlx_chat.widgets import composer
from m7mlx_chat.widgets.completion import Completion
from m7mlx_chat.widgets.messages import Question
from textual import events
from textual.widgets import Static

from m7mlx.errors import InputError


def asked(chat: Chat, number: int = 0) -> str:
    return str(chat.engine.messages(number)[-1]["content"])


def is_open(chat: Chat) -> bool:
    """Whether choices are shown."""
    return chat.app.query_one(Completion).is_open


async def paste(chat: Chat, text: str) -> None:
    chat.app.post_message(events.Paste(text))
    await chat.pilot.pause()


@pytest.mark.parametrize("key", ["ctrl+j", "alt+enter", "shift+enter"])
async def test_new_lines(key: str, tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.pilot.press("a", key, "b", "enter")
        await chat.pilot.pause()
        assert asked(chat) == "a\nb"


async def test_it_grows_with_the_draft_and_no_further_than_it_may(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        heights = []
        for _ in range(20):
            await chat.pilot.press("x", "ctrl+j")
            heights.append(chat.app.composer.region.height)
        assert heights == sorted(heights)
        assert (heights[0], heights[-1]) == (4, 12)


async def test_a_long_paste_is_folded_and_sent_whole(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        text = "line of text\n" * 80_000  # about 1 MB
        await chat.pilot.press("h", "i", "space")
        await paste(chat, text)
        assert len(chat.app.composer.text) < 100
        assert "1,040,000 characters, 80,001 lines" in chat.app.composer.text
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert asked(chat) == "hi " + text.strip()
        assert "more characters" in str(chat.app.query_one(Question).query_one(".body", Static).content)


async def test_a_paste_as_terminals_send_it(tmp_path: Path) -> None:
    """They end lines with a return, and what was copied from a web page can hold anything."""
    async with chatting(tmp_path) as chat:
        await paste(chat, "one\rtwo\r\n\x1b]0;evil\x07")
        assert chat.app.composer.text == "one\ntwo\n␛]0;evil␇"
        chat.app.composer.reset()
        await paste(chat, "line\r" * 50)
        assert "51 lines" in chat.app.composer.text
        chat.app.composer.reset()
        await paste(chat, "two\nlines")
        assert chat.app.composer.text == "two\nlines"


async def test_what_looks_like_a_folded_paste_inside_one_stays_text(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        first = "[pasted text 2: 5,000 characters, 1 lines]" + "a" * 5000
        for text in (first, "b" * 5000):
            await paste(chat, text)
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert asked(chat) == first + "b" * 5000


async def test_a_long_question_comes_back_folded(tmp_path: Path) -> None:
    """Unfolded, a megabyte in the composer would stall every key."""
    async with chatting(tmp_path) as chat:
        await paste(chat, "word " * 200_000)
        await chat.pilot.press("enter")
        await chat.say(Failed("too long"))
        await chat.pilot.press("up")  # from the history
        assert len(chat.app.composer.text) < 100
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert asked(chat, 1) == asked(chat, 0)


# --- what was asked before ------------------------------------------------------------------------


async def test_what_was_asked_before_comes_back_with_the_arrows(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        for question in ("first", "second", "third\nwith two lines"):
            await chat.exchange(question, "yes")
        chat.app.composer.insert("a draft")
        await chat.pilot.press("up")
        assert chat.app.composer.text == "third\nwith two lines"
        await chat.pilot.press("up")
        # the cursor has only gone to the first line
        assert chat.app.composer.text == "third\nwith two lines"
        await chat.pilot.press("up", "up", "up")
        assert chat.app.composer.text == "first"
        await chat.pilot.press("down", "down", "down", "down")
        assert chat.app.composer.text == "a draft"


async def test_what_was_asked_before_is_searched(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        for question in ("about apples", "about pears", "something else"):
            await chat.exchange(question, "yes")
        await chat.pilot.press("ctrl+r")
        await chat.pilot.press(*"ABOUT")
        await chat.pilot.pause()
        assert isinstance(chat.app.screen, Search)
        assert "something else" not in "".join(chat.shown().splitlines()[8:22])
        await chat.pilot.press("down", "enter")
        await chat.pilot.pause()
        assert chat.app.composer.text == "about apples"


# --- completion -----------------------------------------------------------------------------------


async def test_commands_are_completed(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.pilot.press("/", "e")
        await chat.pilot.pause()
        assert is_open(chat)
        assert "/edit" in chat.shown() and "/exit" in chat.shown() and "/export" in chat.shown()
        await chat.pilot.press("down", "down", "enter")
        assert chat.app.composer.text == "/export "
        assert not is_open(chat)
        chat.app.composer.reset()
        await chat.pilot.press(*"/new", "enter")  # all of it typed: it runs
        await chat.pilot.pause()
        assert chat.app.composer.text == ""
        assert chat.engine.asked == []
        await chat.pilot.press("/", "escape")
        assert not is_open(chat)
        assert chat.app.composer.text == "/"


async def test_an_unknown_command_is_kept_and_a_path_is_a_message(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("/nonsense x")
        assert chat.app.composer.text == "/nonsense x"
        assert any("no command /nonsense" in n.message for n in chat.app._notifications)
        chat.app.composer.reset()
        await chat.send("/etc/passwd: what is it?")
        assert asked(chat) == "/etc/passwd: what is it?"


async def test_files_are_completed_and_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "files"
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "to do.md").write_text("buy ```bread```\n")
    (folder / "binary.bin").write_bytes(b"\xff\xfe\x00")
    (folder / ".hidden").write_text("x")
    monkeypatch.chdir(folder)
    async with chatting(tmp_path) as chat:
        await chat.pilot.press(*"see ", "@")
        await chat.pilot.pause()
        assert "notes/" in chat.shown() and "binary.bin" in chat.shown() and ".hidden" not in chat.shown()
        await chat.pilot.press("n", "tab", "t", "enter")
        await chat.pilot.pause()
        assert chat.app.composer.text == "see [file to do.md: 35 characters, 4 lines] "
        await chat.pilot.press(*"@bin", "enter")
        await chat.pilot.pause()
        assert any("binary.bin is not text" in n.message for n in chat.app._notifications)
        assert chat.app.composer.text.endswith("@bin")
        await chat.pilot.press(*["backspace"] * 4, "enter")
        await chat.pilot.pause()
        assert asked(chat) == "see to do.md:\n````\nbuy ```bread```\n````"
    assert [c.text for c in paths(".h")] == [".hidden"]
    assert paths("no/such/folder/") == []


async def test_files_below_are_found_by_their_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "files"
    (folder / "src" / "deep").mkdir(parents=True)
    for name in ("src/deep/rolling_cache.py", "src/other.py"):
        (folder / name).write_text(f"text of {name}")
    monkeypatch.chdir(folder)
    async with chatting(tmp_path) as chat:
        await chat.pilot.press(*"@rocac")
        await until(chat, lambda: "src/deep/rolling_cache.py" in chat.shown())
        assert "other.py" not in chat.shown()
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert chat.app.composer.text == "[file rolling_cache.py: 59 characters, 4 lines] "
        chat.app.composer.reset()
        await chat.pilot.press(*"@src", "tab")
        await chat.pilot.pause()
        assert "all text files" in chat.shown()
        await chat.pilot.press("enter")
        await until(chat, lambda: chat.app.composer.text == "[folder src: 121 characters, 11 lines] ")
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert asked(chat).startswith("src/ (2 files):")


async def test_a_file_that_takes_long_can_be_waited_for_and_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()

    def slowly(name: str) -> str:
        assert may_go_on.wait(20)
        if name == "b.pdf":
            raise InputError("b.pdf is damaged")
        return f"text of {name}"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(composer, "attached", slowly)
    for name in ("a.pdf", "b.pdf"):
        Path(name).touch()
    async with chatting(tmp_path / "data") as chat:
        await chat.pilot.press(*"@a.p", "enter", *"@a.p", "enter", *"@b", "enter", *"what?", "enter")
        await chat.pilot.pause()
        text = "[reading a.pdf …] [reading a.pdf\N{PRIME} …] [reading b.pdf …] what?"
        assert chat.app.composer.text == text
        assert not chat.engine.asked
        assert "press Enter when it is there" in chat.notices()
        chat.app.composer.replace("", (0, 0), (0, len("[reading a.pdf …] ")))  # no longer wanted
        may_go_on.set()
        await until(chat, lambda: "reading" not in chat.app.composer.text)
        await until(chat, lambda: "b.pdf is damaged" in chat.notices())
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert asked(chat) == "text of a.pdf  what?"


async def until(chat: Chat, holds: Callable[[], bool]) -> None:
    for _ in range(200):
        await chat.pilot.pause(0.02)
        if holds():
            return
    assert holds(), chat.shown()


async def test_the_editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that adds a line; without a terminal to give it, it is said that there is none."""
    editor = tmp_path / "editor.sh"
    editor.write_text('#!/bin/sh\necho " and more" >> "$1"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    async with chatting(tmp_path, environment=read_environment()) as chat:
        chat.app.composer.insert("draft")
        await chat.pilot.press("ctrl+g")
        assert any("cannot be opened" in n.message for n in chat.app._notifications)
        monkeypatch.setattr(chat.app, "suspend", nullcontext)
        await chat.pilot.press("ctrl+g")
        assert chat.app.composer.text == "draft and more"
        chat.app.environment = replace(chat.app.environment, editor="/no/such/editor")
        await chat.pilot.press("ctrl+g")
        assert chat.app.composer.text == "draft and more"
        assert any("set $EDITOR" in n.message for n in chat.app._notifications)
