"""No text from outside steers a terminal, wherever it is shown."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

import hostile
from chat_harness import chatting, done
from hostile import EVIL, PLACES, SIZE, UNSAFE
from terminal import OURS, on_terminal


async def test_what_is_recalled_is_asked_again_as_it_was(tmp_path: Path) -> None:
    text = "Why \x1b]0;x\x07 \x7f\x9b \u202e\u200f\u200b [/x][@click=app.quit]?"
    async with chatting(tmp_path) as chat:
        chat.session.ask(text)
        await chat.app.show_all()
        await chat.say(done("Because."))
        chat.app.composer.focus()
        await chat.pilot.press("up", "enter")
        await chat.pilot.pause()
        assert chat.line()[::2] == [text, text]


async def test_half_a_character_can_be_copied(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        chat.app.copy_text("a\ud800b")
        assert chat.app.clipboard == "a\ufffdb"


def test_nothing_that_a_widget_draws_or_a_terminal_gets_is_a_control(tmp_path: Path) -> None:
    """In a real terminal; but Textual's own sequences."""
    written = on_terminal([sys.executable, hostile.__file__, str(tmp_path)], SIZE)
    assert "went through, unsafe: []" in written, written[-2000:]
    for one in PLACES:
        assert one.word in written, one.name
    (copied,) = re.findall(r"\x1b\]52;c;([A-Za-z0-9+/=]*)\x07", written)
    assert base64.b64decode(copied).decode() == "copied" + EVIL
    # the terminal's title is a text: OURS lets no control character into it
    assert not [one for one in OURS.findall(written) if "7777" in one and not one.startswith("\x1b]0;")]
    left = OURS.sub("", written).replace("\r", "").replace("\n", "")
    assert not set(UNSAFE.findall(left))
