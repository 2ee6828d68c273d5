"""The chat driven by keys, on an engine that says what the test tells it to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from m7mlx_chat.actions import ACTIONS
from m7mlx_chat.app import ChatApp
from m7mlx_chat.engine import Done, Event, Failed, Loading, Prefill, Ready, Text
from m7mlx_chat.settings import Settings
from m7mlx_chat.widgets import Answer, ErrorMessage, Help, UserMessage, Welcome
from textual import events
from textual.pilot import Pilot
from textual.widgets import Markdown, Static

from m7mlx.sampling import Sampling

SETTINGS = Settings(model="a[b]/model", system="Be brief", sampling=Sampling(), max_tokens=100)
READY = Ready(window=4096, context=32768, nbytes=4_000_000_000)


class ScriptedEngine:
    """Says what the test tells it to; remembers what it was asked."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.asked: list[list[dict[str, Any]]] = []
        self.cancelled = 0

    def start(self) -> None: ...

    def submit(self, messages: Sequence[dict[str, Any]]) -> None:
        self.asked.append([dict(m) for m in messages])

    def cancel(self) -> None:
        self.cancelled += 1

    def drain(self) -> list[Event]:
        events, self.events = self.events, []
        return events


def done(text: str, reason: Any = "stop", **changes: Any) -> Done:
    values: dict[str, Any] = {
        "ids": [7] * len(text.split()), "tokens_per_second": 21.5, "time_to_first_token": 0.3, "reused_tokens": 0,
        "tokens_seen": 5000, "cache_bytes": 545_000_000,
    }  # fmt: skip
    return Done(reason, text, **values | changes)


class Chat:
    """A running app with its engine, and the shortcuts the tests need."""

    def __init__(self, app: ChatApp, engine: ScriptedEngine, pilot: Pilot[None]) -> None:
        self.app, self.engine, self.pilot = app, engine, pilot

    async def say(self, *events: Event) -> None:
        self.engine.events += events
        await self.app._drain()
        await self.pilot.pause()

    async def send(self, text: str) -> None:
        self.app.composer.insert(text)
        await self.pilot.press("enter")
        await self.pilot.pause()

    def texts(self, kind: type[Static]) -> list[str]:
        return [str(w.content) for w in self.app.query(kind)]

    def status(self) -> str:
        return str(self.app.query_one("#state", Static).content)

    def footers(self) -> list[str]:
        return [str(w.content) for w in self.app.query(".footer").results(Static)]


def running(size: tuple[int, int] = (100, 30)) -> Any:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def context() -> Any:
        engine = ScriptedEngine()
        app = ChatApp(engine, SETTINGS)  # type: ignore[arg-type]
        async with app.run_test(size=size) as pilot:
            yield Chat(app, engine, pilot)

    return context()


async def test_a_conversation_of_two_turns() -> None:
    async with running() as chat:
        assert "loading" in chat.status()
        await chat.say(Loading(5, 10), READY)
        assert chat.status() == "ready"
        await chat.send("Hello")
        assert chat.engine.asked == [
            [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
        ]
        await chat.say(Prefill(512, 2048))
        assert "512/2,048" in chat.status()
        await chat.say(Text("**Hi**"), Text(" there"))
        assert "Esc" in chat.status()
        await chat.say(done("**Hi** there"))
        assert chat.footers()[-1] == "2 tokens · 21.5 tok/s · first after 0.30 s"
        assert chat.app.query_one(Answer).query_one(Markdown).source == "**Hi** there"
        await chat.send("And again")
        assert chat.engine.asked[1] == [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "**Hi** there", "ids": [7, 7]},
            {"role": "user", "content": "And again"},
        ]
        assert chat.texts(UserMessage) == ["Hello", "And again"]


async def test_the_gauge_shows_window_and_what_lies_beyond() -> None:
    async with running() as chat:
        await chat.say(READY)
        await chat.send("x")
        await chat.say(Text("y"), done("y"))
        gauge = str(chat.app.query_one("#gauge", Static).content)
        assert "4,096/4,096 · 904 beyond · 545 MB" in gauge
        assert "▱" not in gauge


async def test_escape_stops_and_keeps_the_text() -> None:
    async with running() as chat:
        await chat.say(READY)
        await chat.send("Tell me a story")
        await chat.say(Text("Once upon"))
        await chat.pilot.press("escape")
        assert chat.engine.cancelled == 1
        await chat.say(Text(" a"), done("Once upon a", "stopped"))
        assert chat.footers()[-1].startswith("stopped · 3 tokens")
        assert chat.app.query_one(Answer).text == "Once upon a"
        assert [m["content"] for m in chat.app.history] == ["Tell me a story", "Once upon a"]
        assert chat.app.state == "ready"


async def test_stopped_before_the_first_token_gives_the_message_back() -> None:
    async with running() as chat:
        await chat.say(READY)
        await chat.send("Too long")
        await chat.say(done("", "stopped", tokens_per_second=0.0))
        assert chat.app.history == []
        assert chat.app.composer.text == "Too long"


async def test_a_message_sent_while_loading_waits() -> None:
    async with running() as chat:
        await chat.send("early")
        assert chat.engine.asked == []
        await chat.send("second")
        assert chat.app.composer.text == "second"  # one waits, the other is kept
        await chat.say(READY)
        assert chat.engine.asked[0][-1]["content"] == "early"


async def test_while_answering_nothing_more_is_sent_and_the_draft_stays() -> None:
    async with running() as chat:
        await chat.say(READY)
        await chat.send("one")
        await chat.send("two")
        assert len(chat.engine.asked) == 1
        assert chat.app.composer.text == "two"


async def test_empty_messages_are_not_sent() -> None:
    async with running() as chat:
        await chat.say(READY)
        for blank in ("", "   ", "\n\n"):
            await chat.send(blank)
        assert chat.engine.asked == []


@pytest.mark.parametrize("key", ["ctrl+j", "alt+enter", "shift+enter"])
async def test_new_lines(key: str) -> None:
    async with running() as chat:
        await chat.say(READY)
        await chat.pilot.press("a", key, "b", "enter")
        assert chat.engine.asked[0][-1]["content"] == "a\nb"


async def test_a_long_paste_is_folded_and_sent_whole() -> None:
    async with running() as chat:
        await chat.say(READY)
        paste = "line of text\n" * 80_000  # about 1 MB
        await chat.pilot.press("h", "i", "space")
        chat.app.post_message(events.Paste(paste))
        await chat.pilot.pause()
        assert len(chat.app.composer.text) < 100
        assert "1,040,000 characters, 80,001 lines" in chat.app.composer.text
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert chat.engine.asked[0][-1]["content"] == "hi " + paste.strip()
        assert "more characters" in chat.texts(UserMessage)[0]


async def test_a_paste_as_terminals_send_it() -> None:
    """They end lines with a return, and what was copied from a web page can hold anything."""
    async with running() as chat:
        chat.app.post_message(events.Paste("one\rtwo\r\n\x1b]0;evil\x07"))
        await chat.pilot.pause()
        assert chat.app.composer.text == "one\ntwo\n␛]0;evil␇"
        chat.app.composer.reset()
        chat.app.post_message(events.Paste("line\r" * 50))
        await chat.pilot.pause()
        assert "51 lines" in chat.app.composer.text


async def test_what_looks_like_a_folded_paste_inside_one_stays_text() -> None:
    async with running() as chat:
        await chat.say(READY)
        first = "[pasted text 2: 5,000 characters, 1 lines]" + "a" * 5000
        for paste in (first, "b" * 5000):
            chat.app.post_message(events.Paste(paste))
            await chat.pilot.pause()
        await chat.pilot.press("enter")
        assert chat.engine.asked[0][-1]["content"] == first + "b" * 5000


async def test_a_long_paste_comes_back_folded_after_a_failure() -> None:
    """Unfolded, a megabyte in the composer would stall every key."""
    async with running() as chat:
        await chat.say(READY)
        chat.app.post_message(events.Paste("word " * 200_000))
        await chat.pilot.pause()
        await chat.pilot.press("enter")
        await chat.say(Failed("too long"))
        assert len(chat.app.composer.text) < 100
        await chat.pilot.press("enter")
        assert len(chat.engine.asked) == 2
        assert chat.engine.asked[0] == chat.engine.asked[1]


async def test_a_short_paste_is_just_text() -> None:
    async with running() as chat:
        chat.app.post_message(events.Paste("two\nlines"))
        await chat.pilot.pause()
        assert chat.app.composer.text == "two\nlines"


HOSTILE = [
    "[/foo] [bold]x[/bold] list[int] [x] [link=http://evil]y[/link]",
    "\x1b]52;c;ZXZpbA==\x07 \x1b[2J \x9b31m \x7f \u202eevil",
    "![image](http://evil/x.png) [text](http://evil) <script>alert(1)</script>",
    "```python\nunclosed fence [/x]",
    "x" * 100_000,
    "|a|b|\n|-|-|\n" + "|c|d|\n" * 300,
    "> " * 200 + "deep",
    "&#27;[2J &lt; \\[ \x00",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_text_is_just_text(hostile: str) -> None:
    async with running() as chat:
        await chat.say(READY)
        await chat.send(hostile)
        await chat.say(*[Text(hostile[i : i + 5000]) for i in range(0, len(hostile), 5000)], done(hostile))
        await chat.pilot.pause()
        shown = chat.texts(UserMessage)[0] + chat.app.query_one(Answer).text
        assert not set(shown) & set("\x00\x07\x1b\x7f\x9b\u202e")
        if hostile.startswith("[/foo]"):
            assert chat.texts(UserMessage) == [hostile]
        screen = chat.app.export_screenshot()
        assert "\x1b" not in screen
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
async def test_nothing_the_model_wrote_is_left_out_or_obeyed(text: str, shown: str) -> None:
    async with running() as chat:
        await chat.say(READY)
        await chat.send("question")
        await chat.say(Text(text), done(text))
        assert [str(w.content) for w in chat.app.query("MarkdownParagraph").results(Static)] == [shown]


async def test_a_link_shows_where_it_leads_and_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as chat:
        opened: list[str] = []
        monkeypatch.setattr(chat.app, "open_url", lambda url, **_: opened.append(url))
        await chat.say(READY)
        await chat.send("x")
        await chat.say(Text("[text](http://evil/[b])"), done("[text](http://evil/[b])"))
        chat.app.query_one(Markdown).post_message(
            Markdown.LinkClicked(chat.app.query_one(Markdown), "http://evil/[b]")
        )
        await chat.pilot.pause()
        assert opened == []
        assert [n.message for n in chat.app._notifications] == ["http://evil/[b]"]


async def test_a_failed_answer_is_a_line_in_the_chat_and_the_message_comes_back() -> None:
    async with running() as chat:
        await chat.say(READY)
        await chat.send("too long")
        await chat.say(Failed("the prompt has 9000 tokens, but [the] context holds 8192"))
        assert chat.texts(ErrorMessage) == ["✗ the prompt has 9000 tokens, but [the] context holds 8192"]
        assert chat.app.composer.text == "too long"
        await chat.pilot.press("enter")
        assert len(chat.engine.asked) == 2


async def test_a_model_that_cannot_be_loaded() -> None:
    async with running() as chat:
        await chat.say(Failed("/x has no weights", fatal=True))
        assert "could not be loaded" in chat.status()
        await chat.send("hello?")
        assert chat.engine.asked == []
        await chat.pilot.press("ctrl+q")
        await chat.pilot.pause()
        assert not chat.app.is_running


async def test_a_failure_in_mid_answer_keeps_what_is_shown() -> None:
    async with running() as chat:
        await chat.say(READY)
        await chat.send("question")
        await chat.say(Text("half an *answer*"), Failed("no memory"))
        assert chat.app.query_one(Answer).text == "half an *answer*"
        assert any("failed" in footer for footer in chat.footers())
        assert chat.app.history == []


async def test_a_new_conversation_while_loading_takes_the_waiting_message_back() -> None:
    async with running() as chat:
        await chat.send("early")
        await chat.pilot.press("ctrl+n")
        await chat.say(READY)
        assert chat.engine.asked == []
        assert len(chat.app.query(Welcome)) == 1


async def test_a_new_conversation_forgets_the_old_one() -> None:
    async with running() as chat:
        await chat.say(READY)
        await chat.send("old")
        await chat.pilot.press("ctrl+n")  # not while answering
        assert chat.texts(UserMessage) == ["old"]
        await chat.say(Text("answer"), done("answer"))
        await chat.pilot.press("ctrl+n")
        await chat.pilot.pause()
        assert chat.texts(UserMessage) == []
        assert len(chat.app.query(Welcome)) == 1
        await chat.send("new")
        assert [m["content"] for m in chat.engine.asked[-1]] == ["Be brief", "new"]


async def test_control_c_copies_clears_stops_and_quits(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as chat:
        copied: list[str] = []
        monkeypatch.setattr(chat.app, "copy_to_clipboard", copied.append)
        monkeypatch.setattr("m7mlx_chat.app.shutil.which", lambda tool: None)
        await chat.say(READY)
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


async def test_help_shows_every_action() -> None:
    async with running((80, 24)) as chat:
        await chat.pilot.press("f1")
        await chat.pilot.pause()
        assert isinstance(chat.app.screen, Help)
        shown = "".join(str(w.content) for w in chat.app.screen.query(Static))
        assert all(action.shown in shown and action.help in shown for action in ACTIONS)
        await chat.pilot.press("escape")
        assert not isinstance(chat.app.screen, Help)


def test_every_action_exists() -> None:
    own = {"send", "newline"}  # the composer's
    for action in ACTIONS:
        name = action.name.split("(")[0]
        assert name in own or hasattr(ChatApp, f"action_{name}"), name


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light", "ansi-dark"])
@pytest.mark.parametrize("size", [(40, 12), (80, 24), (200, 60)], ids=str)
async def test_every_size_and_theme_has_room_for_the_essentials(size: tuple[int, int], theme: str) -> None:
    async with running(size) as chat:
        chat.app.theme = theme
        await chat.say(READY)
        await chat.send("question")
        await chat.say(Text("the answer"), done("the answer"))
        await chat.pilot.pause()
        composer, answer = chat.app.composer.region, chat.app.query_one(Answer).region
        assert composer.height >= 3
        assert composer.bottom < size[1]
        assert answer.bottom <= composer.y
        assert answer.y >= 0


def test_native_output_goes_to_the_log_and_the_terminal_comes_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import os
    import sys

    from m7mlx_chat.app import _stderr_to_log

    with _stderr_to_log(tmp_path / "logs" / "chat.log"):
        os.write(2, b"native noise")
        assert sys.__stderr__ is not None
        sys.__stderr__.write("drawn by Textual")
    os.write(2, b"back again")
    assert capfd.readouterr() == ("drawn by Textual", "back again")  # on stdout: `2>file` must not catch it
    assert (tmp_path / "logs" / "chat.log").read_text() == "native noise"
