"""The user's own prompts."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from chat_harness import Chat, chatting
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from m7mlx_chat.prompts import Prompts, filled, variables
from textual.widgets import Input

from m7mlx.errors import InputError

WORDS = st.text(string.ascii_letters, min_size=1, max_size=5)


@given(st.lists(st.tuples(st.text(st.sampled_from("ab {}\n"), max_size=6).filter(lambda t: "{" not in t), WORDS)))
@settings(max_examples=examples(40), deadline=None)
def test_what_is_filled_in_stands_where_the_variables_stood(parts: list[tuple[str, str]]) -> None:
    text = "".join(f"{between}{{{{ {name}}}}}" for between, name in parts)
    names = list(dict.fromkeys(name for _, name in parts))
    assert variables(text) == names
    values = {name: f"{{{{{name}}}}}!" for name in names}  # what is filled in is not filled in again
    assert filled(text, values) == "".join(between + values[name] for between, name in parts)


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    prompts = Prompts(tmp_path / "prompts")
    assert prompts.names() == []
    with pytest.raises(InputError, match="none yet"):
        prompts.read("a")
    prompts.save("sum up", "  Sum up {{text}}")
    assert prompts.names() == ["sum up"]
    assert prompts.read("sum up") == "  Sum up {{text}}"
    with pytest.raises(InputError, match="already"):
        prompts.save("sum up", "other")
    for name in ("../x", "", "a/b", ".hidden", "x" * 61, "a\nb"):
        with pytest.raises(InputError, match="cannot be a prompt's name"):
            prompts.save(name, "text")
    (prompts.folder / "bad.md").write_bytes(b"\xff\x00")
    with pytest.raises(InputError, match="is not text"):
        prompts.read("bad")
    with pytest.raises(InputError, match=r"there are: bad, sum up"):
        prompts.read("../../etc/passwd")


async def shown(chat: Chat, command: str) -> str:
    await chat.send(command)
    return chat.app.composer.text


async def test_a_prompt_is_filled_in_and_sent(tmp_path: Path) -> None:
    async with chatting(tmp_path, notifications=True) as chat:
        await chat.send("/prompt")
        assert "there are no prompts yet" in chat.notices()
        folder = chat.app.config.path.parent / "prompts"
        folder.mkdir()
        (folder / "translate.md").write_text("Translate to {{language}}: {{text}}\nTo {{language}}!\n")
        (folder / "plain.md").write_text("Tell me a story.")
        assert await shown(chat, "/prompt plain") == "Tell me a story."
        chat.app.composer.reset()
        await chat.send("/prompt")
        await chat.pilot.press(*"tran", "enter")
        await chat.pilot.pause()
        assert len(chat.app.screen.query(Input)) == 2
        await chat.pilot.press(*"French", "enter", *"Good day", "enter")
        await chat.pilot.pause()
        assert chat.app.composer.text == "Translate to French: Good day\nTo French!"
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert chat.line()[0] == "Translate to French: Good day\nTo French!"


async def test_a_form_that_is_left_changes_nothing(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        folder = chat.app.config.path.parent / "prompts"
        folder.mkdir()
        (folder / "one.md").write_text("About {{it}}")
        await chat.send("/prompt one")
        await chat.pilot.press("x", "escape")
        await chat.pilot.pause()
        assert chat.app.composer.text == "" and len(chat.app.screen_stack) == 1


async def test_a_question_is_kept_as_a_prompt(tmp_path: Path) -> None:
    async with chatting(tmp_path, notifications=True) as chat:
        await chat.send("/prompt save early")
        assert "nothing has been asked yet" in chat.notices()
        await chat.exchange("Explain {{thing}} to a child", "Gladly.")
        await chat.send("/prompt save explain")
        assert "kept: /prompt explain" in chat.notices()
        await chat.send("/prompt explain")
        await chat.pilot.press(*"rain", "enter")
        await chat.pilot.pause()
        assert chat.app.composer.text == "Explain rain to a child"
