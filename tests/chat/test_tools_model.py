"""Tools with real parts: Mistral's form of calls, calls by a grammar, answers without a screen."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from m7mlx_chat.events import Called, Done, Event, Given, Seen, Text
from m7mlx_chat.headless import Tools, answer
from m7mlx_chat.loaded import LoadedModel
from m7mlx_chat.printers import JsonPrinter, TextPrinter
from m7mlx_chat.servers import Server
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import Store
from scripted_tools import called

from m7mlx import Piece, Stats, Tokenizer
from m7mlx.answer_reader import AnswerReader
from m7mlx.errors import InputError, RunError

SERVER = Server("s", (sys.executable, str(Path(__file__).parents[1] / "support" / "tool_server.py")))


def told(tokenizer: Tokenizer, pieces: list[Piece], monkeypatch: pytest.MonkeyPatch) -> tuple[Called | Done, str]:
    """How an answer in Mistral's form ends, and the text that is shown of it."""
    loaded = object.__new__(LoadedModel)
    monkeypatch.setattr(loaded, "tokenizer", tokenizer, raising=False)
    monkeypatch.setattr(loaded, "_seen", lambda: Seen(0, 0))
    events: list[Event] = []
    monkeypatch.setattr(loaded, "_emit", events.append, raising=False)
    ended = loaded._tell(iter(pieces), AnswerReader(tokenizer, "allowed"))
    return ended, "".join(event.text for event in events if isinstance(event, Text))


def test_calls_in_mistrals_form(mistral_tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = mistral_tokenizers["v3"]
    mark, end = tokenizer.control_id("[TOOL_CALLS]"), tokenizer.control_id("</s>")
    assert mark is not None and end is not None
    lead = [Piece("I look.", [5]), Piece("", [mark])]
    one = '{"name": "add", "arguments": {"a": 1}}'
    ended, shown = told(
        tokenizer, [*lead, Piece(f"[{one}, {one}]", [6]), Piece("", [end], finish_reason="stop")], monkeypatch
    )
    assert isinstance(ended, Called) and (ended.text, shown) == ("I look.", "I look.")
    assert [(call.name, call.values) for call in ended.calls] == [("add", {"a": 1})] * 2
    ended, shown = told(tokenizer, [*lead, Piece(f"[{one[:20]}", [6], finish_reason="length")], monkeypatch)
    assert isinstance(ended, Done) and (ended.text, ended.reason) == ("I look.", "length")
    assert tokenizer.decode(ended.ids) == "I look."  # what the model wrote of a call is forgotten
    many = ", ".join([one] * 50)
    ended, _ = told(tokenizer, [*lead, Piece(f"[{many}]", [6]), Piece("", [end], finish_reason="stop")], monkeypatch)
    assert isinstance(ended, Called) and len(ended.calls) == 8


@pytest.mark.demo
def test_a_model_that_knows_no_tools_calls_them_by_a_grammar(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "Begin your answer with <tool_call> and call add with a = 20 and b = 22."
    settings, database = Settings(model=str(demo_model), max_tokens=120), tmp_path / "chats.db"
    tools = Tools([SERVER], ["s/add"])
    assert answer(settings, question, database, as_json=True, tools=tools) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    calls = [call for event in events if event["event"] == "calls" for call in event["calls"]]
    assert calls and {call["name"] for call in calls} == {"add"}
    results = [event for event in events if event["event"] == "given"]
    sums = [str(sum(json.loads(call["arguments"]).values())) for call in calls]
    assert [event["result"] for event in results if event["outcome"] == "given"] == sums
    with Store(database) as store:
        kept = [call for step in store.read([2])[0].steps for call in step.calls]
    assert [(call.id, call.result) for call in kept] == [(event["call"], event["result"]) for event in results]


def test_without_a_screen_nothing_runs_that_is_not_named(model_folder: Path, tmp_path: Path) -> None:
    settings = Settings(model=str(model_folder), max_tokens=2)
    marker = tmp_path / "started"
    server = Server("m", (sys.executable, "-c", f"open({str(marker)!r}, 'w')"))
    assert answer(settings, "x", None, tools=Tools([server])) == 0
    assert not marker.exists()
    with pytest.raises(RunError, match="the server of tools m is not there: it has ended"):
        answer(settings, "x", None, tools=Tools([server], ["m"]))
    assert marker.exists()
    with pytest.raises(InputError, match=r"--allow-tool: there is no server 'n'; config\.toml has m"):
        answer(settings, "x", None, tools=Tools([server], ["n/tool"]))


def test_without_the_extra_it_is_said(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    monkeypatch.setattr("m7mlx_chat.tools.start.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'm7mlx\[tools\]'"):
        answer(Settings(model=str(model_folder)), "x", None, tools=Tools([SERVER], ["s"]))


def test_the_answer_alone_is_on_stdout(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = [
        Text("I look."),
        called({"a": "\x1b[2J"}, text="I look."),
        Given("call0", "failed", "no\x1b[2J luck"),
        Text("Nothing."),
        Done("stop", "Nothing.", [1], Stats(), Seen(1, 1)),
    ]
    printed = TextPrinter()
    with printed:
        for event in events:
            printed.show(event)
    out, err = capsys.readouterr()
    assert out == "I look.\n\nNothing.\n" and "\x1b" not in err
    assert err.splitlines() == ['→ look {"a": "\\u001b[2J"}', "✗ no␛[2J luck"]
    for event in events:
        JsonPrinter().show(event)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["text", "calls", "given", "text", "done"]
    assert lines[1]["calls"] == [{"id": "call0", "name": "look", "arguments": '{"a": "\\u001b[2J"}'}]
