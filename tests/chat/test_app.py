"""The chat driven by keys, on an engine that says what the test tells it to."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from chat_harness import READY, Chat, chatting, done
from m7mlx_chat.actions import ACTIONS
from m7mlx_chat.app import ChatApp
from m7mlx_chat.commands import copying
from m7mlx_chat.config import Config
from m7mlx_chat.events import Failed, Loading, Prefill, Seen, Text
from m7mlx_chat.launch import _stderr_to_log
from m7mlx_chat.screens.dialogs import Help
from m7mlx_chat.settings import Settings
from m7mlx_chat.widgets.messages import Answer, Question
from m7mlx_chat.widgets.welcome import Welcome
from textual.widgets import Markdown, Static

from m7mlx.errors import DiskError


def questions(chat: Chat) -> list[str]:
    return [str(view.query_one(".body", Static).content) for view in chat.app.query(Question)]


def last(chat: Chat) -> Answer:
    return chat.app.query(Answer).last()


async def test_a_conversation_of_two_turns(tmp_path: Path) -> None:
    async with chatting(tmp_path, ready=False, settings=Settings(model="a[b]", system="Be brief")) as chat:
        assert "loading" in chat.status()
        await chat.say(Loading(5, 10), READY)
        assert chat.status() == "ready"
        await chat.send("Hello")
        assert chat.engine.messages(0) == [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Hello"},
        ]
        await chat.say(Prefill(512, 2048, 7))
        assert "512/2,048 tokens · 7 known" in chat.footers()[-1]
        await chat.say(Text("**Hi**", 1), Text(" there", 2))
        assert "Esc stops" in chat.status()
        await chat.say(done("**Hi** there"))
        assert chat.footers()[-1] == "2 tokens · 21.5 tok/s · first after 0.30 s"
        assert last(chat).query_one(Markdown).source == "**Hi** there"
        await chat.send("And again")
        assert chat.engine.messages(1) == [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "**Hi** there", "ids": [7, 7]},
            {"role": "user", "content": "And again"},
        ]
        assert questions(chat) == ["Hello", "And again"]


async def test_the_gauge_shows_window_and_what_lies_beyond(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("x", "y")
        gauge = str(chat.app.query_one("#gauge", Static).content)
        assert "4,096/4,096 · 904 beyond · 545 MB" in gauge
        assert "▱" not in gauge
        await chat.pilot.press("f3")
        await chat.pilot.pause()
        assert "turned 1.20 times" in chat.shown()
        assert "token 5,000 goes to slot 840" in chat.shown()
        await chat.send("more")
        await chat.say(Text("z", 1, Seen(6000, 545_000_000)))  # while it answers, too
        assert "1,904 beyond the window" in chat.shown()


async def test_escape_stops_and_keeps_the_text(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("Tell me a story")
        await chat.say(Text("Once upon"))
        await chat.pilot.press("escape")
        assert chat.engine.cancelled == 1
        await chat.say(Text(" a"), done("Once upon a", "stopped"))
        assert chat.footers()[-1].startswith("stopped · 3 tokens")
        assert last(chat).text == "Once upon a"
        assert chat.line() == ["Tell me a story", "Once upon a"]
        assert chat.app.state == "ready"


async def test_stopped_before_the_first_token_nothing_is_lost(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("Too long")
        await chat.say(done("", "stopped"))
        assert chat.line() == ["Too long", ""]
        assert chat.footers()[-1] == "stopped before the first word"
        await chat.send("Shorter")
        # the model is spared the other
        assert [m["content"] for m in chat.engine.messages()] == ["Shorter"]


async def test_a_message_sent_while_loading_is_kept_and_answered_then(tmp_path: Path) -> None:
    async with chatting(tmp_path, ready=False) as chat:
        await chat.send("early")
        assert chat.engine.asked == []
        assert chat.line() == ["early", ""]  # on the disk already
        await chat.send("second")
        assert chat.app.composer.text == ""  # one waits for the model, the other for its turn
        await chat.say(READY)
        assert chat.engine.messages(0)[-1]["content"] == "early"
        await chat.say(done("x"))
        assert chat.engine.messages()[-1]["content"] == "second"


async def test_escape_takes_back_a_message_that_waits_for_the_model(tmp_path: Path) -> None:
    async with chatting(tmp_path, ready=False) as chat:
        await chat.send("early")
        await chat.pilot.press("escape")
        await chat.say(READY)
        assert chat.engine.asked == []
        assert chat.app.state == "ready"


async def test_empty_messages_are_not_sent(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        for blank in ("", "   ", "\n\n"):
            await chat.send(blank)
            chat.app.composer.reset()
        assert chat.engine.asked == []


HOSTILE = [
    "[/foo] [bold]x[/bold] list[int] [x] [link=http://evil]y[/link]",
    "\x1b]52;c;ZXZpbA==\x07 \x1b[2J \x9b31m \x7f \u202eevil",
    "![image](http://evil/x.png) [text](http://evil) <script>alert(1)</script>",
    "```python\nunclosed fence [/x]",
    "x" * 1_000_000,
    "|a|b|\n|-|-|\n" + "|c|d|\n" * 3000,
    "```\n" + "code[/x] <b> *y*\n" * 3000,
    "> " * 200 + "deep",
    "&#27;[2J &lt; \\[ \x00",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_text_is_just_text(hostile: str, tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send(hostile)
        await chat.say(*[Text(hostile[i : i + 5000]) for i in range(0, len(hostile), 5000)], done(hostile))
        await chat.pilot.pause()
        shown = questions(chat)[0] + chat.shown()
        assert not set(shown) & set("\x00\x07\x1b\x7f\x9b\u202e")
        if hostile.startswith("[/foo]"):
            assert questions(chat) == [hostile]
        assert "\x1b" not in chat.app.export_screenshot()
        assert chat.line()[1] == hostile
        await chat.send("still alive")
        assert len(chat.engine.asked) == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("use vector<int> and <think>aloud</think>", "use vector<int> and <think>aloud</think>"),
        ("<div>\nkept\n</div>", "<div>\nkept\n</div>"),
        ("Roses are red\nViolets are blue", "Roses are red\nViolets are blue"),
        ("1 &lt; 2 &#x202e;evil &#27;[2J", "1 < 2 ␦evil �[2J"),
    ],
)
async def test_nothing_the_model_wrote_is_left_out_or_obeyed(text: str, shown: str, tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("question")
        await chat.say(Text(text), done(text))
        assert [str(w.content) for w in chat.app.query("MarkdownParagraph").results(Static)] == [shown]


async def test_a_link_shows_where_it_leads_and_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with chatting(tmp_path) as chat:
        opened: list[str] = []
        monkeypatch.setattr(chat.app, "open_url", lambda url, **_: opened.append(url))
        await chat.exchange("x", "[text](http://evil/[b])")
        markdown = chat.app.query_one(Markdown)
        markdown.post_message(Markdown.LinkClicked(markdown, "http://evil/[b]"))
        await chat.pilot.pause()
        assert opened == []
        assert [n.message for n in chat.app._notifications] == ["http://evil/[b]"]


async def test_an_image_is_its_words_and_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To fetch it would tell a stranger's server what was said: ![](http://evil/?all-of-it)."""
    reached: list[object] = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda self, *given, **more: reached.append(given))

    def look_up(*given: object, **more: object) -> list[object]:
        reached.append(given)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    async with chatting(tmp_path) as chat:
        opened: list[str] = []
        monkeypatch.setattr(chat.app, "open_url", lambda url, **_: opened.append(url))
        image = "![a parrot](http://evil.example/x.png?secret)"
        await chat.exchange(image, f"{image} and [![both](http://evil.example/y.png)](http://evil.example/z)")
        await chat.pilot.pause(0.2)
        (paragraph,) = chat.app.query("MarkdownParagraph").results(Static)
        assert "a parrot" in str(paragraph.content) and "both" in str(paragraph.content)
        assert questions(chat) == [image]
        assert (reached, opened) == ([], [])


async def test_a_failed_answer_says_why_and_the_question_is_kept(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("too long")
        await chat.say(Failed("the prompt has 9000 tokens, but [the] context holds 8192"))
        assert "✗ the prompt has 9000 tokens, but [the] context holds 8192" in chat.shown()
        assert chat.line() == ["too long", ""]
        await chat.send("/retry")
        assert chat.engine.messages(1) == chat.engine.messages(0)


async def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    async with chatting(tmp_path, ready=False) as chat:
        await chat.send("hello?")
        await chat.say(Failed("/x has no weights", fatal=True))
        await chat.pilot.pause()
        assert "✗ /x has no weights" in chat.shown()  # and which other there is
        await chat.pilot.press("escape")
        assert "no model is loaded" in chat.status()
        assert chat.line() == ["hello?", ""]
        assert chat.engine.asked == []
        await chat.pilot.press("ctrl+q")
        await chat.pilot.pause()
        assert not chat.app.is_running
        assert chat.app.failure == Failed("/x has no weights", fatal=True)


async def test_a_failure_in_mid_answer_keeps_what_is_shown(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("question")
        await chat.say(Text("half an *answer*"), Failed("no memory"))
        assert last(chat).text == "half an *answer*"
        assert any("failed" in footer for footer in chat.footers())
        assert chat.line() == ["question", "half an *answer*"]


async def test_a_disk_that_is_full_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("question")
        with monkeypatch.context() as patch:
            patch.setattr(chat.store, "finish", lambda *a, **k: (_ for _ in ()).throw(DiskError("the disk is full")))
            await chat.say(Text("the answer"), done("the answer"))
            assert any("the disk is full" in n.message for n in chat.app._notifications)
            assert last(chat).text == "the answer"
        chat.app.look_around()  # from time to time: there is room again
        assert chat.line() == ["question", "the answer"]
        assert chat.store.message(chat.session.line[-1]).status == "complete"


async def test_a_new_conversation_leaves_the_old_one_where_it_is(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("old", "answer")
        await chat.pilot.press("ctrl+n")
        await chat.pilot.pause()
        assert questions(chat) == []
        assert chat.app.query_one(Welcome).display
        await chat.send("new")
        assert [m["content"] for m in chat.engine.messages()] == ["new"]
        assert [c.title for c in chat.store.conversations()] == ["new", "old"]


async def test_an_answer_goes_on_while_another_conversation_is_read(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("first", "one")
        other = chat.session.conversation
        await chat.pilot.press("ctrl+n")
        await chat.send("second")
        await chat.say(Text("beginning"))
        here = chat.session.conversation
        await chat.app.open_conversation(other or 0)
        await chat.say(Text(" and more"))
        assert questions(chat) == ["first"]
        await chat.app.open_conversation(here or 0)
        assert last(chat).text == "beginning and more"
        await chat.say(Text("."), done("beginning and more."))
        assert last(chat).text == "beginning and more."
        assert chat.line() == ["second", "beginning and more."]


async def test_control_c_copies_clears_stops_and_quits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with chatting(tmp_path) as chat:
        copied: list[str] = []
        monkeypatch.setattr(chat.app, "copy_to_clipboard", copied.append)
        monkeypatch.setattr(copying, "copy_with_tool", lambda text: False)
        chat.app.composer.insert("draft")
        chat.app.composer.select_all()
        await chat.pilot.press("ctrl+c")
        assert copied == ["draft"]
        chat.app.composer.move_cursor((0, 0))
        await chat.pilot.press("ctrl+c")
        assert chat.app.composer.text == ""
        await chat.send("go")
        await chat.pilot.press("ctrl+c")
        assert chat.engine.cancelled == 1
        await chat.say(Text("a b"), done("a b", "stopped"))
        await chat.pilot.press("ctrl+y")
        assert copied[-1] == "a b"
        await chat.pilot.press("ctrl+c")
        assert chat.app.is_running
        await chat.pilot.press("ctrl+c")
        await chat.pilot.pause()
        assert not chat.app.is_running


async def test_help_shows_every_action(tmp_path: Path) -> None:
    config = Config(tmp_path / "config.toml", keys={"new": "ctrl+t"})
    async with chatting(tmp_path, size=(100, 140), config=config) as chat:
        await chat.pilot.press("f1")
        await chat.pilot.pause()
        assert isinstance(chat.app.screen, Help)
        shown = chat.shown()
        for action in ACTIONS:
            if action.name != "new":
                assert action.shown in shown
            assert action.help in shown
            assert not action.slash or f"/{action.slash}" in shown
        assert "ctrl+t" in shown  # the user's own key
        await chat.pilot.press("escape")
        assert not isinstance(chat.app.screen, Help)


async def test_keys_of_the_users_own(tmp_path: Path) -> None:
    config = Config(tmp_path / "config.toml", keys={"new": "ctrl+t", "nonsense": "x"})
    async with chatting(tmp_path, config=config) as chat:
        assert any("nonsense" in n.message for n in chat.app._notifications)
        await chat.exchange("old", "answer")
        await chat.pilot.press("ctrl+n")
        assert questions(chat) == ["old"]
        await chat.pilot.press("ctrl+t")
        await chat.pilot.pause()
        assert questions(chat) == []


def test_every_action_exists() -> None:
    for action in ACTIONS:
        name = action.name.split("(")[0]
        assert (action.place == "composer" and not action.keys) or hasattr(ChatApp, f"action_{name}"), name


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light", "ansi-dark"])
@pytest.mark.parametrize("size", [(40, 12), (80, 24), (200, 60)], ids=str)
async def test_every_size_and_theme_has_room_for_the_essentials(
    size: tuple[int, int],
    theme: str,
    tmp_path: Path,
) -> None:
    async with chatting(tmp_path, size=size, config=Config(tmp_path / "c.toml", theme=theme)) as chat:
        await chat.exchange("question", "the answer")
        await chat.pilot.pause()
        composer, answer = chat.app.composer.region, last(chat).region
        assert composer.height >= 3
        assert composer.bottom < size[1]
        assert answer.bottom <= composer.y
        assert answer.y >= 0
        assert chat.app.theme == theme


async def test_no_key_of_the_chat_works_under_a_dialog(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("old", "answer")
        await chat.pilot.press("f1", "ctrl+n", "ctrl+b", "f3")
        await chat.pilot.press("escape")
        assert questions(chat) == ["old"]
        assert not chat.app.sidebar.is_shown


def test_native_output_goes_to_the_log_and_the_terminal_comes_back(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with _stderr_to_log(tmp_path / "logs" / "chat.log"):
        os.write(2, b"native noise")
        assert sys.__stderr__ is not None
        sys.__stderr__.write("drawn by Textual")
    os.write(2, b"back again")
    # on stdout: `2>file` must not catch it
    assert capfd.readouterr() == ("drawn by Textual", "back again")
    assert (tmp_path / "logs" / "chat.log").read_text() == "native noise"


async def test_a_question_to_begin_with(tmp_path: Path) -> None:
    async with chatting(tmp_path, question="What is this?") as chat:
        assert chat.engine.messages(0)[-1]["content"] == "What is this?"


async def test_the_palette_runs_commands(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("old", "answer")
        await chat.pilot.press("ctrl+p")
        await chat.pilot.pause()
        await chat.pilot.press(*"/new")
        await chat.pilot.pause(0.6)
        await chat.pilot.press("down", "enter")
        await chat.pilot.pause(0.3)
        assert questions(chat) == []
