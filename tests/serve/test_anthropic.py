"""Anthropic's API: the answers of the library in its words, read by its own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from m7mlx_serve.answering import Answerer
from m7mlx_serve.anthropic.answers import MessageAnswers
from m7mlx_serve.anthropic.messages import MessageRequest
from m7mlx_serve.endpoint import Prompts, ReadRequest
from m7mlx_serve.errors import ApiError
from m7mlx_serve.reading import read
from published import check_published
from pydantic import TypeAdapter
from serving import ENDLESS, NAME, serving, settle, user

from m7mlx import Piece, Request, Stats, load, stream_generate
from m7mlx.tokens.tokenizer import Tokenizer

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
BODY: dict[str, Any] = {"model": NAME, "max_tokens": 4, "messages": user("Hi"), "temperature": 0}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
ADD = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": DIGIT}, "required": ["a"], "additionalProperties": False},
}


def plain(changes: dict[str, Any]) -> list[dict[str, Any]]:
    messages = MessageRequest.model_validate({"model": "m", "max_tokens": 1, **changes}).conversation().messages
    return [dict(message) for message in messages]


def test_blocks_become_messages() -> None:
    use = {"type": "tool_use", "id": "abc", "name": "add", "input": {"a": 1}, "cache_control": {"type": "ephemeral"}}
    result = {
        "type": "tool_result",
        "tool_use_id": "abc",
        "content": [{"type": "text", "text": "2"}],
        "is_error": False,
    }
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    found = plain(
        {
            "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}, {"text": "T"}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": [thought, {"type": "text", "text": "c"}, use]},
                {"role": "user", "content": [result, {"type": "text", "text": "d"}]},
                {"role": "assistant", "content": "The answer"},
            ],
        }
    )
    call = {"id": "abc", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert found == [
        {"role": "system", "content": "S\n\nT"},
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc", "content": "2"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "The answer", "prefix": True},
    ]


def test_claude_codes_changing_line_does_not_break_the_prefix(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    def ids(attribution: str) -> list[int]:
        system = [{"type": "text", "text": attribution}, {"type": "text", "text": "You are Claude Code."}]
        body = BODY | {"model": "m", "system": system}
        return list(read(MESSAGES, json.dumps(body).encode(), "m", mistral_tokenizers["v3"]).prompts.ids[0])

    lines = [f"x-anthropic-billing-header: cc_version=2.1.{n}; cc_entrypoint=cli; cch={n:05x};" for n in (7, 99)]
    assert ids(lines[0]) == ids(lines[1]) == ids("") != ids("x-other: 7")
    for line in lines:
        assert plain({"system": line + "\nYou are.", "messages": user("a")})[0]["content"] == "You are."
    quoted = f"Before.\n{lines[0]}"
    assert plain({"system": quoted, "messages": user("a")})[0]["content"] == quoted


@pytest.mark.parametrize(
    ("path", "changes", "status", "kind", "said"),
    [
        (MESSAGES, {"max_tokens": None}, 400, "invalid_request_error", "max_tokens: is missing"),
        (MESSAGES, {"messages": []}, 400, "invalid_request_error", "messages"),
        (MESSAGES, {"model": "claude"}, 404, "not_found_error", "leave it out"),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400,
         "invalid_request_error", "'image' cannot be read"),
        (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400, "invalid_request_error",
         "would run on the server"),
        (MESSAGES, {"mcp_servers": [{"url": "http://10.0.0.1"}]}, 400, "invalid_request_error", "calls no other"),
        (MESSAGES, {"tool_choice": {"type": "tool", "name": "f"}}, 400, "invalid_request_error", "no tools"),
        (COUNT, {"stream": True}, 400, "invalid_request_error", "stream"),
        (COUNT, {"messages": user("x" * 1_000_001)}, 400, "invalid_request_error", "1,000,000"),
    ],
)  # fmt: skip
def test_refusals_are_anthropics(
    url: str, path: str, changes: dict[str, Any], status: int, kind: str, said: str
) -> None:
    body = {key: value for key, value in BODY.items() if path == MESSAGES or key in ("model", "messages")}
    found = httpx.post(url + path, json=body | changes, timeout=30)
    assert found.status_code == status
    assert found.json()["type"] == "error" and found.json()["error"]["type"] == kind
    assert said in found.json()["error"]["message"]
    assert (
        httpx.post(url + path, content=b"{", headers={"Content-Type": "application/json"}).json()["type"] == "error"
    )
    assert httpx.post(url + path, content=b"{}", headers={"Content-Type": "text/plain"}).json()["type"] == "error"


def test_whoever_leaves_a_stream_gives_the_place_back(url: str) -> None:
    body = {"messages": ENDLESS["messages"], "max_tokens": 1_000_000, "stream": True, "stop_sequences": ["\u1234"]}
    with httpx.stream("POST", url + MESSAGES, json=body, timeout=30) as stream:
        next(stream.iter_lines())
    settle(url, 0)


# --- the real client ------------------------------------------------------------------------------


@pytest.fixture
def api(request: pytest.FixtureRequest) -> Iterator[Any]:
    with import_module("anthropic").Anthropic(
        base_url=request.getfixturevalue(getattr(request, "param", "url")), api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


pytestmark = pytest.mark.filterwarnings("ignore")  # of Anthropic's client
real = pytest.mark.clients


@real
def test_answers_are_those_of_the_library(api: Any, model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    messages = [{"role": "system", "content": "Be brief."}, *user("Hello")]
    expected = "".join(p.text for p in stream_generate(model, tokenizer, messages, max_tokens=12))
    asked: dict[str, Any] = {
        "model": NAME,
        "system": "Be brief.",
        "messages": user("Hello"),
        "max_tokens": 12,
        "extra_body": {"temperature": 0},
    }
    whole = api.messages.create(**asked)
    assert [block.text for block in whole.content] == [expected] and whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 12 and whole.usage.input_tokens == len(tokenizer.chat.encode(messages))
    with api.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == expected
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)
    counted = api.messages.count_tokens(model=NAME, system="Be brief.", messages=user("Hello"))
    assert counted.input_tokens == whole.usage.input_tokens
    again = api.messages.count_tokens(  # as Open WebUI asks: with all that it asks the model
        model=NAME,
        system="Be brief.",
        messages=user("Hello"),
        extra_body={"max_tokens": 9, "temperature": 0.5, "stop_sequences": ["a"]},
    )
    assert again == counted
    stop = expected[5]
    stopped = api.messages.create(**asked, stop_sequences=["\u1234", stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == expected[: expected.index(stop)]
    begun = api.messages.create(
        **asked | {"messages": [*user("Hello"), {"role": "assistant", "content": expected[:4]}]}
    )
    assert begun.content[0].text


@real
@pytest.mark.parametrize("api", ["url", "chatml_url"], indirect=True)
def test_tools_are_called_and_answered(api: Any) -> None:
    choice = {"type": "tool", "name": "add", "disable_parallel_tool_use": True}
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 200, "tools": [ADD], "extra_body": {"temperature": 0}}
    found = api.messages.create(messages=user("1+1?"), tool_choice=choice, **asked)
    assert found.stop_reason == "tool_use"
    (block,) = found.content
    assert (block.type, block.name, set(block.input)) == ("tool_use", "add", {"a"})
    events = []
    with api.messages.stream(messages=user("1+1?"), tool_choice=choice, **asked) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert final.content[0].input == block.input and final.stop_reason == "tool_use"
    kinds = [event.type for event in events if event.type not in ("input_json", "text")]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "2"}
    history = [*user("1+1?"), {"role": "assistant", "content": found.content}, {"role": "user", "content": [result]}]
    again = api.messages.create(messages=history, **asked | {"max_tokens": 3})
    assert again.content and again.usage.input_tokens > found.usage.input_tokens
    schema = {"type": "json_schema", "schema": {"const": 7}}
    in_json = api.messages.create(messages=user("?"), model=NAME, max_tokens=20, output_config={"format": schema})
    assert in_json.content[0].text == "7"


def told(tokenizer: Tokenizer, pieces: Sequence[Piece], error: ApiError | None = None) -> list[dict[str, Any]]:
    """The events of an answer of these pieces, and the whole message; each as it is published."""

    async def ask(requests: Sequence[Request], seconds: float) -> AsyncGenerator[tuple[int, Piece], None]:
        for piece in pieces:
            yield 0, piece
        if error is not None:
            raise error

    types = import_module("anthropic.types")
    one = MessageRequest.model_validate(BODY | {"model": NAME, "tools": [ADD]})
    read = ReadRequest(one.without_texts(), Prompts([one.prompts(tokenizer).ids[0]], tool_use="allowed"))
    answerer = Answerer(NAME, 100, tokenizer, ask, None, 60.0)

    async def all_of_it() -> tuple[list[str], str | None]:
        events = [event async for event in MessageAnswers(answerer, read).stream()]
        return events, None if error else "".join(await MessageAnswers(answerer, read).whole())

    texts, whole = asyncio.run(all_of_it())
    found = []
    for text in texts:
        name, data = text.removesuffix("\n\n").split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        shape = types.ErrorResponse if found[-1]["type"] == "error" else types.RawMessageStreamEvent
        check_published(TypeAdapter(shape), found[-1])
    if whole is not None:
        check_published(TypeAdapter(types.Message), json.loads(whole))
        found.append(json.loads(whole))
    return found


@real
def test_events_are_those_of_anthropics_schema(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    """Thoughts, words and calls; a stream adds up to the whole message."""
    tokenizer = mistral_tokenizers["v3"]
    mark = tokenizer.control_id("[TOOL_CALLS]")
    assert mark is not None
    calls = '[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}]'
    pieces = [
        *(Piece(thought=text, ids=[9]) for text in ("H", "m.")), *(Piece(text, [9]) for text in ("Let ", "me.")),
        Piece(ids=[mark]), *(Piece(letter, [9]) for letter in calls),
        Piece(ids=[2], stats=Stats(prompt_tokens=3), finish_reason="stop"),
    ]  # fmt: skip
    *events, whole = told(tokenizer, pieces)
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
        if event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            ((name, value),) = [(key, text) for key, text in event["delta"].items() if key != "type"]
            blocks[-1][name] = blocks[-1].get(name, "") + value
    made = [block | {"input": json.loads(block.pop("partial_json"))} for block in blocks if "input" in block]
    assert [block["input"] for block in made] == [{"a": 1}, {"a": 2}]
    joined = [next((one for one in made if one["id"] == block.get("id")), block) for block in blocks]
    assert [{**block, "id": 0} for block in joined] == [{**block, "id": 0} for block in whole["content"]]
    delta = next(event for event in events if event["type"] == "message_delta")
    assert delta["delta"]["stop_reason"] == whole["stop_reason"] == "tool_use"
    assert delta["usage"] == whole["usage"] and whole["usage"]["output_tokens"] == len(calls) + 6
    *events, whole = told(tokenizer, [Piece("a", [9]), Piece("", [9], finish_reason="stop", stop="b")])
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "b")
    *events, whole = told(tokenizer, [Piece(ids=[2], finish_reason="length")])
    assert whole["content"] == [{"type": "text", "text": ""}] and whole["stop_reason"] == "max_tokens"
    *_, last = told(tokenizer, [Piece("a", [9])], ApiError(503, "it ends"))
    assert last == {"type": "error", "error": {"type": "overloaded_error", "message": "it ends"}}


@real
def test_a_key_is_anthropics_too(model_folder: Path, tmp_path: Path) -> None:
    key, anthropic = "a-key-of-some-length-1234", import_module("anthropic")
    (tmp_path / "key").write_text(key)
    with serving(model_folder, "--api-key-file", str(tmp_path / "key")) as (url, _):
        for given in (key, "wrong-key-of-some-length"):
            for how in ({"api_key": given}, {"auth_token": given, "api_key": None}):
                with anthropic.Anthropic(base_url=url, max_retries=0, **how) as api:
                    if given == key:
                        assert api.messages.create(model=NAME, messages=user("Hi"), max_tokens=2).content
                    else:
                        with pytest.raises(anthropic.AuthenticationError):
                            api.messages.create(model=NAME, messages=user("Hi"), max_tokens=2)


@real
def test_litellms_bridge(url: str) -> None:
    litellm: Any = import_module("litellm")
    found = litellm.completion(
        model=f"anthropic/{NAME}", api_base=url, api_key="none", messages=user("Hi"), max_tokens=3
    )
    assert found.usage.completion_tokens <= 3 and found.choices[0].finish_reason
