"""Tools in the chat: no call without the user's word, and all of it kept with the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_harness import Chat, chatting, done
from m7mlx_chat.config import Config, read_config
from m7mlx_chat.events import Failed, Text, Verdict
from m7mlx_chat.portable import parse, to_json
from m7mlx_chat.portable.page import to_html, to_markdown
from m7mlx_chat.screens.approval import Approve
from m7mlx_chat.screens.dialogs import Figures
from m7mlx_chat.steps import Call, Step, messages_of, steps_of, values_of
from m7mlx_chat.store import Store
from m7mlx_chat.store.rows import Message
from m7mlx_chat.widgets.calls import CallView
from scripted_tools import ScriptedTools, called

from m7mlx.errors import InputError


def with_tools(chat: Chat, standing: Verdict = "ask") -> ScriptedTools:
    tools = ScriptedTools(standing)
    chat.session.tools = tools
    return tools


def last(chat: Chat) -> Message:
    return chat.store.message(chat.session.line[-1])


def outcomes(chat: Chat) -> list[str]:
    return [call.outcome for step in last(chat).steps for call in step.calls]


async def answered_after_a_call(chat: Chat) -> None:
    """Begin an answer that rests on what a tool gave."""
    tools = with_tools(chat, "make")
    await chat.send("?")
    await chat.say(called({}, text="I look."))
    tools.give("a box")
    await chat.say(Text("Ye"))


async def choose(chat: Chat, place: int) -> None:
    """Choose the nth word of the dialog that asks."""
    await chat.pilot.press(*["down"] * place, "enter")
    await chat.pilot.pause()


async def test_a_call_is_shown_asked_about_made_and_told(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(100, 40)) as chat:
        tools = with_tools(chat)
        await chat.send("Where is it?")
        assert [tool["name"] for tool in chat.engine.asked[-1].tools] == ["look"]
        await chat.say(Text("I look."), called({"where": "here\x1b[2J"}, text="I look."))
        assert isinstance(chat.app.screen, Approve) and not tools.made
        shown = chat.shown()
        assert "The model calls look" in shown and "a tool of w: program" in shown
        assert '"where": "here\\u001b[2J"' in shown or "here␛[2J" in shown
        await choose(chat, 1)
        assert [call.values for call in tools.made] == [{"where": "here\x1b[2J"}] and not tools.words
        assert "look is running" in chat.status() and len(chat.engine.asked) == 1
        tools.give("in the\x1b]0;x\x07 box")
        await chat.say()
        assert [message["role"] for message in chat.engine.messages()] == ["user", "assistant", "tool"]
        assert chat.engine.messages()[1]["content"] == "I look."
        assert chat.engine.messages()[2]["content"] == "in the\x1b]0;x\x07 box"
        await chat.say(Text("In the box."), done("In the box."))
        answer = last(chat)
        assert (answer.text, answer.status, outcomes(chat)) == ("In the box.", "complete", ["given"])
        assert answer.statistics["generated_tokens"] == 3 + 3
        shown = chat.shown()
        assert "I look." in shown and "▸ ✓ look where=" in shown and "in the" not in shown
        await chat.pilot.click(CallView)
        await chat.pilot.pause()
        assert "in the␛]0;x␇ box" in chat.shown()


async def test_enter_that_was_meant_for_the_composer_allows_nothing(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        tools = with_tools(chat)
        await chat.send("?")
        await chat.say(called({}))
        await chat.pilot.press("a", "y", "1", "enter", "space", "enter")
        await chat.pilot.pause()
        assert isinstance(chat.app.screen, Approve) and not tools.made


async def test_nobody_is_asked_amid_typing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with chatting(tmp_path) as chat:
        with_tools(chat)
        await chat.send("?")
        await chat.pilot.press("m", "o")
        await chat.say(called({}))
        assert not isinstance(chat.app.screen, Approve) and "waits for your word" in chat.status()
        await chat.pilot.press("r", "e")
        assert chat.app.composer.text == "more"
        monkeypatch.setattr("m7mlx_chat.commands.tools._TYPING_SECONDS", 0.0)
        await chat.say()
        assert isinstance(chat.app.screen, Approve) and chat.app.composer.text == "more"


async def test_a_call_that_comes_after_esc_is_not_made(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        tools = with_tools(chat, "make")
        await chat.send("?")
        await chat.say(Text("I look."))
        await chat.pilot.press("escape")
        await chat.say(called({}, text="I look."))
        assert not tools.made and last(chat).status == "stopped" and outcomes(chat) == ["stopped"]
        assert "I look." in chat.shown() and chat.state() == "ready"


async def test_the_question_goes_away_with_the_answer(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        with_tools(chat)
        await chat.send("?")
        await chat.say(called({}))
        assert isinstance(chat.app.screen, Approve)
        await chat.say(Failed("the model is gone", fatal=True))
        await chat.pilot.pause()
        assert outcomes(chat) == ["stopped"]
        assert not any(isinstance(screen, Approve) for screen in chat.app.screen_stack)


@pytest.mark.parametrize(("place", "word"), [(2, "always"), (3, None), (4, "never")])
async def test_words_are_kept_and_refusals_told(tmp_path: Path, place: int, word: str | None) -> None:
    async with chatting(tmp_path) as chat:
        tools = with_tools(chat)
        await chat.send("?")
        await chat.say(called({}))
        await choose(chat, place)
        assert tools.words == ([("look", word)] if word else [])
        assert bool(tools.made) == (word == "always")
        if not tools.made:
            assert chat.engine.messages()[-1]["content"] == "The user does not allow this call."
            await chat.say(done("Then not."))
            assert outcomes(chat) == ["refused"] and "not allowed" in chat.shown()


async def test_esc_stops_what_is_asked_and_what_runs(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        tools = with_tools(chat)
        await chat.send("?")
        await chat.say(called({}))
        await chat.pilot.press("escape")
        await chat.pilot.pause()
        assert chat.session.under_way is None and outcomes(chat) == ["stopped"] and not tools.made
        assert chat.state() == "ready" and last(chat).status == "stopped"
        await chat.send("Again?")
        assert [m["role"] for m in chat.engine.messages()] == ["user", "assistant", "tool", "user"]
        tools.standing = "make"
        await chat.say(called({}, {}))
        assert len(tools.made) == 1
        await chat.pilot.press("escape")
        await chat.pilot.pause()
        assert tools.cancelled == 1 and outcomes(chat) == ["stopped", "stopped"] and chat.state() == "ready"
        tools.give("late")
        await chat.say()
        assert outcomes(chat) == ["stopped", "stopped"] and len(chat.engine.asked) == 2


async def test_what_waits_has_its_turn_after_a_call_was_stopped(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        with_tools(chat)
        await chat.send("?")
        await chat.send("And then?")
        await chat.say(called({}))
        await chat.pilot.press("escape")
        await chat.pilot.pause()
        assert chat.engine.messages()[-1] == {"role": "user", "content": "And then?"}


async def test_calls_follow_calls_up_to_a_number_and_continue(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        tools = with_tools(chat, "make")
        chat.session.rounds = 2
        await chat.send("?")
        for n in range(2):
            await chat.say(called({"n": n}, first=n))
            tools.give(f"result {n}")
            await chat.say()
        assert chat.session.under_way is None and "2 times without an answer" in chat.shown()
        await chat.send("/continue")
        assert [m["role"] for m in chat.engine.messages()] == ["user"] + ["assistant", "tool"] * 2
        await chat.say(done("Enough."))
        assert (last(chat).text, outcomes(chat)) == ("Enough.", ["given", "given"])


async def test_failures_are_told_and_the_answer_goes_on(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        tools = with_tools(chat, "make")
        await chat.send("?")
        await chat.say(called({}))
        tools.give("it\nbroke", "failed")
        await chat.say()
        assert chat.engine.messages()[-1]["content"] == "it\nbroke"
        tools.standing, tools.why = "refuse", "there is no tool 'look'"
        await chat.say(called({}, first=5))
        assert chat.engine.messages()[-1]["content"] == "there is no tool 'look'"
        await chat.say(Failed("the model broke"))
        assert last(chat).status == "error" and outcomes(chat) == ["failed", "failed"]
        assert "✗ look" in chat.shown() and "it broke" in chat.shown() and "the model broke" in chat.shown()


async def test_steps_are_there_after_reopening_forking_and_another_answer(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await answered_after_a_call(chat)
        # at any moment: the process may be killed
        assert steps_of(json.loads(_stored(tmp_path)))[0].calls[0].result == "a box"
        await chat.say(Text("s"), done("Yes"))
        conversation = chat.session.conversation
        assert conversation is not None
        await chat.send("/new")
        await chat.app.open_conversation(conversation)
        await chat.pilot.pause()
        assert "I look." in chat.shown() and "✓ look" in chat.shown() and "Yes" in chat.shown()
        await chat.send("/fork")
        assert outcomes(chat) == ["given"] and chat.session.conversation != conversation
        await chat.send("And now?")
        assert [m["role"] for m in chat.engine.messages()] == ["user", "assistant", "tool", "assistant", "user"]
        await chat.say(done("x"))
        await chat.send("/retry")
        assert last(chat).siblings == 2


async def test_an_edited_answer_keeps_the_calls_that_it_rests_on(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await answered_after_a_call(chat)
        await chat.say(Text("s"), done("Yes"))
        await chat.pilot.press("alt+up", "e", "!", "enter")
        await chat.pilot.pause()
        assert chat.line()[-1] == "Yes!" and outcomes(chat) == ["given"]
        await chat.send("/continue")
        assert [m["role"] for m in chat.engine.messages()] == ["user", "assistant", "tool"]
        assert chat.engine.asked[-1].continues == "Yes!"


def _stored(folder: Path) -> str:
    with Store(folder / "chats.db") as other:
        message = other.read([2])[0]
        return json.dumps(message.statistics.get("steps"))


async def test_a_call_left_open_is_never_made_later(tmp_path: Path) -> None:
    """Neither after a crash, nor out of a stranger's file."""
    async with chatting(tmp_path) as chat:
        tools = with_tools(chat, "make")
        steps = values_of([Step("", (Call("1", "look", "{}"),))])
        asked = chat.store.ask(None, None, "?")
        chat.store.finish(asked.answer, "stopped", "", {"steps": steps})
        await chat.app.open_conversation(asked.conversation)
        await chat.send("/continue")
        assert not tools.made and chat.engine.messages()[-1]["content"] == "The call was stopped."


async def test_the_question_waits_for_the_tools(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        tools = with_tools(chat)
        tools.is_settled = False
        await chat.send("?")
        assert not chat.engine.asked
        tools.settle()
        await chat.say()
        assert len(chat.engine.asked) == 1


async def test_tools_are_listed_and_turned_off(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("/tools")
        assert "there are no tools" in chat.notices().lower()
        tools = with_tools(chat)
        await chat.send("/tools")
        assert isinstance(chat.app.screen, Figures) and "look" in chat.shown() and "Looks." in chat.shown()
        assert "\x1b" not in chat.shown()
        await chat.pilot.press("escape")
        await chat.send("/tools off")
        await chat.send("?")
        assert not tools.is_on and not chat.engine.asked[-1].tools
        await chat.say(done("x"))
        await chat.send("/tools ask look")
        assert "asked about again" in chat.notices()
        await chat.send("/tools ask hook")
        assert "nothing is kept of a tool 'hook'" in chat.notices()


# --- what is kept ---------------------------------------------------------------------------------


def test_what_was_done_crosses_as_json_and_damage_is_left_out() -> None:
    steps = (Step("I look.", (Call("1", "look", '{"a": 1}', "given", "x"), Call("2", "look", "no JSON"))),)
    assert steps_of(json.loads(json.dumps(values_of(steps)))) == steps
    damaged: Any
    for damaged in (None, 7, "x", [7], [{"text": 1, "calls": []}], [{"text": "", "calls": [{"id": 1}]}], [{}]):
        assert steps_of(damaged) == ()
    wrong = values_of(steps)
    wrong[0]["calls"][0]["outcome"] = "run it"
    assert [call.id for step in steps_of(wrong) for call in step.calls] == ["2"]


def test_whatever_a_model_wrote_can_be_told_again() -> None:
    deep = '{"a": ' * 100 + "1" + "}" * 100
    calls = tuple(Call(str(n), "look", text) for n, text in enumerate(('{"a": 1}', "no", "[1]", "", deep)))
    told = messages_of([Step("", calls)])[0]["tool_calls"]
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in told)


def test_exports_have_the_calls_and_imports_take_them(tmp_path: Path) -> None:
    result = "```\n<script>alert(1)</script>\x1b[2J"
    steps = values_of([Step("*I* look.", (Call("1", "look", '{"a": "<b>"}', "given", result),))])
    with Store(tmp_path / "a.db") as store:
        asked = store.ask(None, None, "?")
        store.finish(asked.answer, "complete", "Yes", {"steps": steps})
        conversation, branch = store.conversation(asked.conversation), store.branch(asked.answer)
        page, text = to_html(conversation, branch), to_markdown(conversation, branch)
        (tree,) = parse(to_json(store.tree(asked.conversation)))
    assert "<script>" not in page and "<summary>look (given)</summary>" in page and "<em>I</em> look." in page
    assert "````text\nlook" in text and "\x1b" not in text + page and text.index("look.") < text.index("Yes")
    assert tree.nodes[1].steps == steps_of(steps)


# --- config.toml ----------------------------------------------------------------------------------


def config_of(folder: Path, text: str) -> Config:
    (folder / "config.toml").write_text(text)
    return read_config(folder / "config.toml")


def test_servers_in_the_file(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        'tool_rounds = 3\n[tools.a]\ncommand = ["x", "y"]\nenv = { A = "b" }\n'
        '[tools.b]\nurl = "http://127.0.0.1:1/mcp"\ntimeout = 5\nheaders = { K = "v" }\n',
    )
    a, b = config.servers
    assert (a.name, a.command, a.env, a.address, config.tool_rounds) == ("a", ("x", "y"), {"A": "b"}, "x y", 3)
    assert (b.url, b.timeout, b.headers) == ("http://127.0.0.1:1/mcp", 5.0, {"K": "v"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tools = 1", "tools are tables"),
        ("[tools.a]", "needs either command"),
        ('[tools.a]\ncommand = "x"', "command is a list of texts"),
        ('[tools.a]\ncommand = ["x"]\nurl = "http://x"', "needs either command"),
        ('[tools.a]\nurl = "file:///etc"', "url is an address"),
        ('[tools.a]\ncommand = ["x"]\ntimeout = 0', "timeout is a number"),
        ('[tools.a]\ncommand = ["x"]\nenv = { A = 1 }', "env is a table of texts"),
        ('[tools.a]\ncommand = ["x"]\ncwd = "x"', "there is no setting 'cwd'"),
        ('[tools."a b"]\ncommand = ["x"]', "a name has letters"),
        ("tool_rounds = 0", "tool_rounds is a whole number"),
    ],
)
def test_what_is_wrong_in_the_file_is_told(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        config_of(tmp_path, text)


def test_values_of_a_call() -> None:
    values: dict[str, Any] = {"a": [1]}
    assert Call("1", "x", json.dumps(values)).values == values and Call("1", "x", "").values == {}
