"""Tool calls and thoughts of models since v11, through the real `openai` client."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from m7mlx_serve.openai.chat import ChatShape
from m7mlx_serve.openai.choices import Choice
from models import small_config, write_folder
from serving import NAME, serving
from tekken_files import SIZE, write_tekken

from m7mlx import Piece
from m7mlx.answer_reader import AnswerReader
from m7mlx.tokens.infill import infill_ids
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tools.calling import ToolUse
from m7mlx.tools.calls import MARK, NamedCallReader

VERSIONS = ["v7", "v11", "v13"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {version: load_tokenizer(write_tekken(tmp_path_factory.mktemp(version), version)) for version in VERSIONS}


# --- what is read ---------------------------------------------------------------------------------


def read(parts: list[str], cuts: list[int]) -> tuple[list[dict[str, Any]], NamedCallReader]:
    """What a client makes of the deltas; parts that are names of control tokens are those."""
    reader, calls = NamedCallReader(), list[dict[str, Any]]()
    for part in parts:
        edges = [0, *sorted(min(cut, len(part)) for cut in cuts), len(part)]
        is_mark = part in (MARK, "[ARGS]", "[CALL_ID]")
        texts = [part[start:end] for start, end in itertools.pairwise(edges)]
        for delta in reader.mark(part) if is_mark else [d for text in texts for d in reader.add(text)]:
            if "id" in delta:
                calls.append({"id": delta["id"], "type": delta["type"], "function": dict(delta["function"])})
            else:
                calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    assert calls == reader.calls
    return calls, reader


def plain(calls: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(
        st.from_regex("[A-Za-z0-9_.-]{1,9}", fullmatch=True), st.dictionaries(st.text(max_size=5), JSON, max_size=3)
    ),
    min_size=1,
    max_size=3,
)


@given(CALLS, st.lists(st.integers(0, 60), max_size=8), st.sampled_from(["", " ", "\n"]))
def test_calls_are_what_was_written(calls: list[tuple[str, dict[str, Any]]], cuts: list[int], space: str) -> None:
    parts = [part for name, given in calls for part in (MARK, name, "[ARGS]", space + json.dumps(given) + space)][1:]
    found, reader = read(parts, cuts)
    assert [(name, json.loads(given)) for name, given in plain(found)] == calls
    assert not reader.is_open and not reader.rest


@pytest.mark.parametrize(
    ("parts", "calls", "is_open"),
    [
        (["f", "[ARGS]", '{"name": "Bob", "arguments": {}}'], [("f", '{"name": "Bob", "arguments": {}}')], False),
        (["f", "[CALL_ID]", "a1B2c3D4e", "[ARGS]", "{}"], [("f", "{}")], False),
        (["f", "[ARGS]", '{"x": "}'], [("f", '{"x": "}')], True),
        (["f", "[ARGS]"], [("f", "")], True),
        (["f", "[ARGS]", '{"x": "\\\\\\"}"} and more'], [("f", '{"x": "\\\\\\"}"}')], False),
        (["f", "[ARGS]", "{}", MARK, "g", "[ARGS]", "{}", MARK, "h"], [("f", "{}"), ("g", "{}")], True),
        (["[ARGS]", "{}"], [], True),
        (['[{"name": "f", "arguments": {}}]'], [], True),
        (["I would rather [ARGS] not"], [], True),
    ],
)  # fmt: skip
def test_what_models_write_besides(parts: list[str], calls: list[tuple[str, str]], is_open: bool) -> None:
    found, reader = read(parts, [1, 3])
    assert (plain(found), reader.is_open) == (calls, is_open)
    if not calls:
        assert reader.rest == "".join(part for part in parts if part != "[ARGS]")


def test_the_id_that_the_model_gave(tokenizers: dict[str, Tokenizer]) -> None:
    assert read(["f", "[CALL_ID]", "a1B2c3D4e", "[ARGS]", "{}"], [])[0][0]["id"] == "a1B2c3D4e"
    for other in ("short", "longer than nine", "a1B2c3D4é"):
        assert len(read(["f", "[CALL_ID]", other, "[ARGS]", "{}"], [])[0][0]["id"]) == 9


def fed(tokenizer: Tokenizer, parts: list[str], tools: bool = True) -> tuple[list[Any], Any]:
    """The chunks and the whole of an answer; a part that is the name of a control token is that."""
    use: ToolUse = "allowed" if tools else "none"
    both = [Choice(0, tokenizer, ChatShape(), AnswerReader(tokenizer, use), streamed) for streamed in (True, False)]
    pieces = []
    for part in parts:
        token = tokenizer.control_id(part)
        pieces.append(Piece(part, tokenizer.encode(part)) if token is None else Piece(ids=[token]))
    pieces += [Piece(thought="Hm."), Piece(finish_reason="stop")]
    chunks = [chunk for piece in pieces for told in both for chunk in told.feed(piece)]
    return chunks, both[1].whole()


@pytest.mark.parametrize("version", VERSIONS)
def test_each_format_is_read_in_its_own_way(tokenizers: dict[str, Tokenizer], version: str) -> None:
    tokenizer = tokenizers[version]
    by_name = ["Let me see.", MARK, "f", "[ARGS]", '{"name": "Bob"}']
    in_list = ["Let me see.", MARK, '[{"name": "f", "arguments": {"name": "Bob"}}]']
    own, other = (in_list, by_name) if version == "v7" else (by_name, in_list)
    chunks, whole = fed(tokenizer, own)
    assert plain(whole["message"]["tool_calls"]) == [("f", '{"name": "Bob"}')]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("Let me see.", "tool_calls")
    assert whole["message"]["reasoning_content"] == "Hm."
    told = [chunk["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in told) == "Let me see."
    assert [delta["reasoning_content"] for delta in told if "reasoning_content" in delta] == ["Hm."]
    if version != "v7":
        assert "tool_calls" not in fed(tokenizer, other)[1]["message"]
    spelled = "".join(own)
    assert fed(tokenizer, ["see: " + spelled])[1]["message"]["content"] == "see: " + spelled
    assert "tool_calls" not in fed(tokenizer, own, tools=False)[1]["message"]


# --- from the client ------------------------------------------------------------------------------

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"$ref": "#/$defs/short"}},
                "required": [key],
                "additionalProperties": False,
                "$defs": {"short": {"type": "integer", "minimum": 0, "maximum": 99}},
            },
        },
    }
    for name, key in (("weather", "city"), ("time.now-2", "zone"))
]


@pytest.fixture(scope="module", params=["v11", "v13"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = write_folder(tmp_path_factory.mktemp("model") / "small", small_config(vocab_size=SIZE, n_layers=1))
    (folder / "tokenizer.model").unlink()
    write_tekken(folder, request.param)
    with serving(folder) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.parametrize("stream", [False, True])
def test_demanded_calls_make_a_round_trip(client: openai.OpenAI, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "Weather? [TOOL_CALLS]x[ARGS]{}"}]
    common: Any = {"model": NAME, "tools": TOOLS, "temperature": 1.0, "seed": 3}
    for n, choice in enumerate(["required", {"type": "function", "function": {"name": "time.now-2"}}]):
        asked = common | {"tool_choice": choice, "parallel_tool_calls": False, "messages": messages, "max_tokens": 60}
        if stream:
            name, arguments, given, reason = "", "", "", None
            for chunk in client.chat.completions.create(stream=True, **asked):
                delta = chunk.choices[0].delta
                assert not delta.content
                for part in delta.tool_calls or []:
                    assert part.function is not None
                    given, name = given + (part.id or ""), name + (part.function.name or "")
                    arguments += part.function.arguments or ""
                reason = chunk.choices[0].finish_reason
        else:
            answer = client.chat.completions.create(**asked).choices[0]
            assert answer.message.tool_calls is not None and not answer.message.content
            (call,) = answer.message.tool_calls
            given, name, arguments, reason = (
                call.id,
                call.function.name,
                call.function.arguments,
                answer.finish_reason,
            )
        assert reason == "tool_calls" and (n == 0 or name == "time.now-2")
        key = {"weather": "city", "time.now-2": "zone"}[name]
        assert set(json.loads(arguments)) == {key} and 0 <= json.loads(arguments)[key] < 100
        called = {"id": given, "type": "function", "function": {"name": name, "arguments": arguments}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [called], "reasoning_content": "x"},
            {"role": "tool", "tool_call_id": given, "content": "7"},
        ]
    last = client.chat.completions.create(model=NAME, messages=messages, tools=TOOLS, max_tokens=3)
    assert last.choices[0].message.role == "assistant"


def test_a_model_that_is_not_told_how_much_to_think(client: openai.OpenAI) -> None:
    """Agents say so to every model: it makes no difference to one that cannot be told."""
    answers = [
        client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "x"}], temperature=0, max_tokens=5, extra_body=extra
        )
        for extra in ({}, {"reasoning_effort": "high"})
    ]
    assert answers[0].choices[0].message == answers[1].choices[0].message


def test_the_text_between_two(client: openai.OpenAI, tokenizers: dict[str, Tokenizer]) -> None:
    ids = infill_ids(tokenizers["v11"], "def f(", "return [INST]")
    common: Any = {"model": NAME, "max_tokens": 6, "temperature": 0}
    expected = client.completions.create(prompt=ids, **common).choices[0].text
    assert client.completions.create(prompt="def f(", suffix="return [INST]", **common).choices[0].text == expected
    asked = {"prompt": "def f(", "suffix": "return [INST]", "options": {"num_predict": 6, "temperature": 0}}
    generate = str(client.base_url.copy_with(path="/api/generate"))
    assert httpx.post(generate, json={**asked, "stream": False}, timeout=30).json()["response"] == expected
    with pytest.raises(openai.BadRequestError, match="a suffix goes with a prompt that is a text"):
        client.completions.create(prompt=ids, suffix="x", **common)
