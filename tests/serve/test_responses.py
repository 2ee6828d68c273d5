"""OpenAI's API of responses: the answers of the library in its words, read by its own clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from agent import check_agent
from m7mlx_serve.answering import Answerer
from m7mlx_serve.endpoint import Prompts, ReadRequest
from m7mlx_serve.errors import ApiError
from m7mlx_serve.reading import read
from m7mlx_serve.reading_process import pack_reply, unpack_reply
from m7mlx_serve.responses.answers import ResponseAnswers
from m7mlx_serve.responses.create import ResponseRequest
from m7mlx_serve.responses.held import Held, HeldResponses
from m7mlx_serve.responses.items import sealed
from openai.types.responses import Response, ResponseStreamEvent
from published import check_published
from pydantic import BaseModel, TypeAdapter
from serving import ENDLESS, NAME, client, settle, user

from m7mlx import Piece, Request, Stats, load, stream_generate
from m7mlx.tokens.tokenizer import Tokenizer

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": NAME, "input": "Hi", "temperature": 0, "max_output_tokens": 4}
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
REPLY: TypeAdapter[Any] = TypeAdapter(Response)
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
PARAMETERS = {"type": "object", "properties": {"a": DIGIT}, "required": ["a"], "additionalProperties": False}
ADD: dict[str, Any] = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": True}
PATCH: dict[str, Any] = {"type": "custom", "name": "patch", "description": "Patches.", "format": {"type": "text"}}
SPACE: dict[str, Any] = {
    "type": "namespace",
    "name": "mcp__files",
    "description": "Files.",
    "tools": [{"type": "function", "name": "list", "parameters": PARAMETERS}],
}


def body(**changes: Any) -> ResponseRequest:
    return ResponseRequest.model_validate(BODY | changes)


def plain(**changes: Any) -> list[dict[str, Any]]:
    return [dict(message) for message in body(**changes).conversation().messages]


def call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


# --- what is read ---------------------------------------------------------------------------------


def test_items_become_messages() -> None:
    """As agents put a turn back: thoughts, words and calls of one turn are one message."""
    items = [
        {"role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": sealed("hm")},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "phase": "commentary",
         "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "abc", "name": "add", "arguments": '{"a": 1}'},
        {"type": "custom_tool_call", "id": "ctc", "call_id": "def", "name": "patch", "input": "x\n", "status": "ok"},
        {"type": "web_search_call", "id": "ws", "status": "completed", "action": {"type": "search", "query": "q"}},
        {"type": "function_call_output", "call_id": "abc", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "custom_tool_call_output", "call_id": "def", "output": "done"},
        {"type": "reasoning", "summary": [], "encrypted_content": "of another server"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]  # fmt: skip
    assert plain(input=items, instructions="S") == [
        {"role": "system", "content": "S"},
        {"role": "system", "content": "D"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm",
         "tool_calls": [call("abc", "add", '{"a": 1}'), call("def", "patch", '{"input": "x\\n"}')]},
        {"role": "tool", "tool_call_id": "abc", "content": "2"},
        {"role": "tool", "tool_call_id": "def", "content": "done"},
        {"role": "assistant", "content": "No."},
    ]  # fmt: skip


def test_what_codex_sends_is_understood(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    """Its fields, and tools of which this server can run none."""
    shell = {"type": "function", "name": "shell", "description": "Runs.", "strict": False, "parameters": PARAMETERS}
    sent = {
        "model": "m",
        "instructions": "You are Codex.",
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "x",
        "reasoning": {"effort": "medium", "summary": "auto"},
        "text": {"verbosity": "low"},
        "client_metadata": {"x": "y"},
        "service_tier": None,
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "ls"}]}],
        "tools": [shell, {"type": "web_search", "external_web_access": False}, PATCH, SPACE],
    }
    found = read(PATH, json.dumps(sent).encode(), "m", mistral_tokenizers["v3"])
    assert isinstance(found.body, ResponseRequest) and found.prompts.tool_use == "allowed"
    assert (
        found.prompts.held == b""
        and set(found.body.called) == {"patch", "mcp__files__list"}
        and found.body.seals_thoughts
    )
    told = [tool["name"] for tool in ResponseRequest.model_validate(sent).conversation().tools]
    assert told == ["shell", "patch", "mcp__files__list"]
    again = unpack_reply(PATH, pack_reply(found))
    assert isinstance(again.body, ResponseRequest) and again.body.called == found.body.called
    assert list(again.prompts.ids[0]) == list(found.prompts.ids[0])


def test_choices_of_tools() -> None:
    tools = [ADD, PATCH]
    for choice, expected in (
        (None, ("auto", None, 2)),
        ("required", ("required", None, 2)),
        ({"type": "function", "name": "add"}, ("required", "add", 2)),
        ({"type": "custom", "name": "patch"}, ("required", "patch", 2)),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]},
            ("auto", None, 1),
        ),
    ):
        found = body(tools=tools, tool_choice=choice).conversation()
        assert (found.choice, found.named, len(found.tools)) == expected


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"input": None}, 400, "input: is missing"),
        ({"input": []}, 400, "at least one message"),
        ({"background": True}, 400, "answers come at once"),
        ({"truncation": "auto"}, 400, "shorten it"),
        ({"conversation": "conv_1"}, 400, "previous_response_id"),
        ({"messages": []}, 400, "its name is input"),
        ({"previous_response_id": "resp_" + "0" * 32}, 404, "send the whole conversation"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "send the item itself"),
        ({"input": [{"type": "computer_call_output"}]}, 400, "'computer_call_output' cannot be read"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "'input_image' cannot be read"),
        ({"tools": [{"type": "local_shell"}]}, 400, "give it as a function"),
        ({"tool_choice": {"type": "function", "name": "f"}}, 400, "no tools"),
        ({"include": ["message.output_text.logprobs"]}, 400, "/v1/chat/completions"),
        ({"text": {"format": {"type": "json_schema"}, "n": 1}}, 400, "text"),
        ({"model": "gpt-5"}, 404, "leave it out"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(url: str, changes: dict[str, Any], status: int, said: str) -> None:
    found = httpx.post(url + PATH, json=BODY | changes, timeout=30)
    assert (found.status_code, said in found.json()["error"]["message"]) == (status, True), found.text


# --- what is told ---------------------------------------------------------------------------------


def told(
    tokenizer: Tokenizer, pieces: Sequence[Piece], held: HeldResponses, error: ApiError | None = None, **changes: Any
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The events of an answer of these pieces, as OpenAI's schema has them, and the whole."""

    async def ask(requests: Sequence[Request], seconds: float) -> AsyncGenerator[tuple[int, Piece], None]:
        for piece in pieces:
            yield 0, piece
        if error is not None:
            raise error

    request = body(tools=[ADD, PATCH, SPACE], **changes)
    use = "allowed" if request.tools else "none"
    prompts = Prompts([request.prompts(tokenizer).ids[0]], tool_use=use, held=request.prompts(tokenizer).held)  # type: ignore[arg-type]
    answerer = Answerer(NAME, 100, tokenizer, ask, None, 60.0)

    def answers() -> ResponseAnswers:
        return ResponseAnswers(held, answerer, ReadRequest(request.without_texts(), prompts))

    async def all_of_it() -> tuple[list[str], str | None]:
        events = [event async for event in answers().stream()]
        return events, None if error else "".join(await answers().whole())

    texts, whole = asyncio.run(all_of_it())
    events = []
    for text in texts:
        name, data = text.removesuffix("\n\n").split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        check_published(EVENTS, events[-1], [".response.store"])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    if whole is None:
        return events, None
    check_published(REPLY, json.loads(whole), [".store"])
    return events, json.loads(whole)


def without_ids(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


def test_events_are_those_of_openais_schema(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    """Thoughts, words and calls of both kinds; a stream adds up to the whole answer."""
    tokenizer, held = mistral_tokenizers["v3"], HeldResponses()
    mark = tokenizer.control_id("[TOOL_CALLS]")
    assert mark is not None
    calls = '[{"name": "add", "arguments": {"a": 1}}, {"name": "patch", "arguments": {"input": "x\\ny"}}'
    calls += ', {"name": "mcp__files__list", "arguments": {"a": 2}}]'
    pieces = [
        *(Piece(thought=text, ids=[9]) for text in ("H", "m.")), *(Piece(text, [9]) for text in ("Let ", "me.")),
        Piece(ids=[mark]),
        *(Piece(letter, [9]) for letter in calls),
        Piece(ids=[2], stats=Stats(prompt_tokens=3), finish_reason="stop"),
    ]  # fmt: skip
    events, whole = told(tokenizer, pieces, held, include=["reasoning.encrypted_content"])
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-1] == "completed" and kinds.count("output_item.added") == kinds.count("output_item.done") == 5
    response = events[-1]["response"]
    assert whole is not None and without_ids(whole["output"]) == without_ids(response["output"])
    thought, message, function, custom, named = response["output"]
    assert (named["namespace"], named["name"], named["arguments"]) == ("mcp__files", "list", '{"a": 2}')
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert thought["encrypted_content"] == sealed("Hm.") and message["content"][0]["text"] == "Let me."
    assert (function["name"], function["arguments"], function["status"]) == ("add", '{"a": 1}', "completed")
    assert (custom["type"], custom["name"], custom["input"]) == ("custom_tool_call", "patch", "x\ny")
    joined: dict[tuple[str, str], str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            place = event["item_id"], event["type"]
            joined[place] = joined.get(place, "") + event["delta"]
    assert [*joined.values()] == ["Hm.", "Let me.", '{"a": 1}', "x\ny", '{"a": 2}']
    assert [done["item"] for done in events if done["type"] == "response.output_item.done"] == response["output"]
    assert response["usage"]["output_tokens"] == len(calls) + 6
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    found = held.find("", response["id"])
    assert found and json.loads(found.reply) == response
    last = json.loads(found.messages)[-1]
    assert (last["content"], last["reasoning_content"], len(last["tool_calls"])) == ("Let me.", "Hm.", 3)
    back = [*user("Hi"), *response["output"], {"type": "function_call_output", "call_id": "x", "output": "2"}]
    assert plain(input=back)[1] == last


def test_answers_that_are_cut_or_fail_say_so(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, held = mistral_tokenizers["v3"], HeldResponses()
    events, whole = told(tokenizer, [Piece("a", [9]), Piece("b", [9], finish_reason="length")], held)
    assert whole and events[-1]["type"] == "response.incomplete"
    for response in (whole, events[-1]["response"]):
        assert response["status"] == response["output"][0]["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    events, _ = told(tokenizer, [Piece("a", [9])], held, ApiError(503, "it ends"))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "it ends"}
    assert held.find("", events[-1]["response"]["id"]) is None
    with pytest.raises(ApiError):
        told(tokenizer, [], held, ApiError(429, "full"))
    events, whole = told(tokenizer, [Piece(ids=[2], finish_reason="stop")], held, store=False)
    assert whole and whole["output"][0]["content"][0]["text"] == "" and held.find("", whole["id"]) is None


def test_what_is_held_is_bounded_and_each_keys_own() -> None:
    held = HeldResponses(most_bytes=100, most=3)
    ids = [f"resp_{n:032x}" for n in range(5)]
    for id in ids[:3]:
        held.put("a", id, Held(b"{}", b"[%d]" % int(id[-1])))
    assert held.find("a", ids[0]) and held.find("b", ids[0]) is None
    held.put("a", ids[3], Held(b"{}", b"[3]"))
    assert [bool(held.find("a", id)) for id in ids] == [True, False, True, True, False]
    sent = json.dumps({"previous_response_id": ids[2], "input": f'"{ids[0]}" {ids[3]}'}).encode()
    assert held.mentioned("a", sent) == {ids[2]: b"[2]"} and held.mentioned("b", sent) == {}
    held.put("a", ids[4], Held(b"x" * 99, b""))
    assert held.find("a", ids[0]) is None and held.find("a", ids[4])
    held.put("a", ids[0], Held(b"x" * 101, b""))
    assert held.find("a", ids[0]) is None and not held.drop("a", ids[4])


@pytest.mark.parametrize("bounds", [{"most": 8}, {"most_bytes": 8 * len(b"{}[0]")}])
def test_one_key_cannot_have_all_others_responses_forgotten(bounds: dict[str, int]) -> None:
    held = HeldResponses(**bounds)
    for id in ("x", "y"):
        held.put("quiet", id, Held(b"{}", b"[0]"))
    for n in range(50):
        held.put("loud", str(n), Held(b"{}", b"[0]"))
    assert held.find("quiet", "x") and held.find("quiet", "y")
    assert [n for n in range(50) if held.find("loud", str(n))] == [44, 45, 46, 47, 48, 49]
    assert not held.drop("nobody", "x") and held.find("nobody", "x") is None
    for n in range(50):
        held.drop("loud", str(n))
    for n in range(4):
        held.put("quiet", str(n), Held(b"{}", b"[0]"))
    assert all(held.find("quiet", id) for id in ("x", "y", "0", "1", "2", "3"))
    held.put("loud", "huge", Held(b"{}", b"x" * 1000)) if "most_bytes" in bounds else None
    assert held.find("quiet", "x") and held.find("loud", "huge") is None


# --- the real clients -----------------------------------------------------------------------------


def test_answers_are_those_of_the_library(url: str, model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    messages = [{"role": "system", "content": "Be brief."}, *user("Hello")]
    expected = "".join(p.text for p in stream_generate(model, tokenizer, messages, max_tokens=12))
    asked: dict[str, Any] = {"model": NAME, "instructions": "Be brief.", "input": "Hello", "max_output_tokens": 12}
    with client(url) as api:
        whole = api.responses.create(**asked, temperature=0)
        assert (whole.output_text, whole.status) == (expected, "incomplete")
        assert whole.usage and whole.usage.input_tokens == len(tokenizer.chat.encode(messages))
        with api.responses.stream(**asked, temperature=0) as stream:
            events = list(stream)
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
        assert events[-1].type == "response.incomplete" and events[-1].response.usage == whole.usage
        again = api.responses.create(
            model=NAME, input="And?", previous_response_id=whole.id, temperature=0, max_output_tokens=5
        )
        history = [*user("Hello"), {"role": "assistant", "content": expected}, *user("And?")]
        assert again.usage and again.usage.input_tokens == len(tokenizer.chat.encode(history))
        assert again.output_text == "".join(p.text for p in stream_generate(model, tokenizer, history, max_tokens=5))
        assert api.responses.retrieve(whole.id).output_text == expected
        api.responses.delete(whole.id)
        for gone in (api.responses.retrieve, api.responses.delete):
            with pytest.raises(openai.NotFoundError):
                gone(whole.id)
        with pytest.raises(openai.NotFoundError):
            api.responses.create(**asked, previous_response_id=whole.id)
        kept = api.responses.create(**asked, store=False)
        with pytest.raises(openai.NotFoundError):
            api.responses.retrieve(kept.id)


@pytest.mark.parametrize("server", ["url", "chatml_url"])
def test_tools_and_structured_output(server: str, request: pytest.FixtureRequest) -> None:
    class One(BaseModel):
        one: bool

    with client(request.getfixturevalue(server)) as api:
        choice: Any = {"type": "function", "name": "add"}
        asked: dict[str, Any] = {"model": NAME, "tools": [ADD], "temperature": 0, "max_output_tokens": 200}
        found = api.responses.create(input="1+1?", tool_choice=choice, parallel_tool_calls=False, **asked)
        (called,) = found.output
        assert called.type == "function_call" and called.name == "add" and set(json.loads(called.arguments)) == {"a"}
        with api.responses.stream(input="1+1?", tool_choice=choice, parallel_tool_calls=False, **asked) as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_response().output[0].type == "function_call"
        assert kinds[-3:] == [
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
        result: Any = {"type": "function_call_output", "call_id": called.call_id, "output": "2"}
        again = api.responses.create(
            input=[result], previous_response_id=found.id, **asked | {"max_output_tokens": 3}
        )
        assert again.usage and found.usage and again.usage.input_tokens > found.usage.input_tokens
        parsed = api.responses.parse(model=NAME, input="?", text_format=One, temperature=0, max_output_tokens=200)
        assert isinstance(parsed.output_parsed, One)


def test_a_long_history_is_read_elsewhere(url: str) -> None:
    """A short body that goes on from a long conversation, and one that leaves its stream."""
    with client(url) as api:
        first = api.responses.create(model=NAME, input="x" * 20_000, max_output_tokens=2)
        again = api.responses.create(model=NAME, input="y", previous_response_id=first.id, max_output_tokens=2)
        assert again.usage and first.usage and again.usage.input_tokens > first.usage.input_tokens
    sent = {"input": ENDLESS["messages"], "stream": True, "tools": []}
    with httpx.stream("POST", url + PATH, json=sent, timeout=30) as stream:
        next(stream.iter_lines())
    settle(url, 0)


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")  # of the agents' own
@pytest.mark.parametrize("server", ["url", "chatml_url"])
async def test_agents(server: str, request: pytest.FixtureRequest) -> None:
    """With a tool and an output type: either a call or the JSON comes."""
    await check_agent(request.getfixturevalue(server), "OpenAIResponsesModel")
