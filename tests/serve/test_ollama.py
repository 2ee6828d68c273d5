"""Ollama's API: the answers of the library in its words, read by its own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from m7mlx_serve.ollama.chat import OllamaChatRequest
from serving import NAME, settle, user

from m7mlx import load, stream_generate

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
PARAMETERS = {"type": "object", "properties": {"a": DIGIT}, "required": ["a"], "additionalProperties": False}
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "description": "", "parameters": PARAMETERS}}


@pytest.fixture
def api(request: pytest.FixtureRequest) -> Iterator[Any]:
    with import_module("ollama").Client(host=request.getfixturevalue(request.param)) as client:
        yield client


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")  # of Ollama's client
@pytest.mark.parametrize("api", ["url"], indirect=True)
def test_answers_are_those_of_the_library(api: Any, model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    expected = "".join(p.text for p in stream_generate(model, tokenizer, user("Hello"), max_tokens=9))
    (tag,) = api.list().models
    shown = api.show(tag.model)
    assert "tools" in shown.capabilities and shown.modelinfo["llama.context_length"] > 0
    options = {"temperature": 0, "num_predict": 9, "num_ctx": 4096}
    for name in (NAME, tag.model):
        found = api.chat(name, user("Hello"), options=options)
        assert found.message.content == expected and found.done_reason in ("length", "stop")
    assert found.prompt_eval_count == len(tokenizer.chat.encode(user("Hello"))) and found.eval_count <= 9
    lines = list(api.chat(NAME, user("Hello"), options=options, stream=True, keep_alive="5m", think=False))
    assert "".join(line.message.content for line in lines) == expected
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert api.generate(NAME, "Hello", options=options).response == expected
    raw = "".join(p.text for p in stream_generate(model, tokenizer, "Hello", max_tokens=9))
    assert (
        "".join(line.response for line in api.generate(NAME, "Hello", raw=True, options=options, stream=True)) == raw
    )
    assert api.chat(NAME, user("?"), format={"const": 7}, options=options).message.content == "7"
    history = [*user("Hello"), found.message, *user("And?")]
    assert api.chat(NAME, history, options=options).done
    wrong = import_module("ollama").ResponseError
    with pytest.raises(wrong, match="not served here"):
        api.chat("llama3", user("Hi"))


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("api", ["chatml_url"], indirect=True)
def test_calls_and_their_results_go_back(api: Any) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    history: list[Any] = [
        *user("1?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_name": "add"},
    ]
    assert api.chat(NAME, history, tools=[ADD], options={"num_predict": 3}).done
    for stream in (False, True):
        for seed in range(3):  # it knows nothing, and may call or not; what it calls is there
            found = api.chat(NAME, history, tools=[ADD], options={"num_predict": 30, "seed": seed}, stream=stream)
            for line in found if stream else [found]:
                for made in line.message.tool_calls or []:
                    assert made.function.name == "add"


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/api/chat", {"messages": []}, 400, "messages: must have at least 1 item"),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, 400, "reads text alone"),
        ("/api/generate", {"prompt": "a", "template": "x"}, 400, "own chat format"),
        ("/api/generate", {"prompt": "a", "options": {"mirostat": 2}}, 400, "mirostat can only be 0"),
        ("/api/show", {"model": "other"}, 404, "not served here"),
        ("/api/chat", {"messages": user("x" * 1_000_001)}, 400, "1,000,000"),
    ],
)
def test_refusals_are_ollamas(url: str, path: str, body: dict[str, Any], status: int, said: str) -> None:
    found = httpx.post(url + path, json=body, timeout=30)
    assert found.status_code == status and said in found.json()["error"]
    assert set(found.json()) == {"error"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        # Open WebUI: its parameters and its calls, which have numbers and ids.
        ("/api/chat", {"model": "small:latest", "stream": True, "system": "Be brief.", "tools": [ADD], "messages": [
            *user("1?"),
            {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [
                {"index": 0, "id": "call_1", "function": {"name": "add", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "2", "tool_call_id": "call_1"}],
            "options": {"num_predict": 2, "mirostat": 0, "mirostat_eta": 0.1, "mirostat_tau": 5.0, "num_ctx": 2048}}),
        ("/api/generate", {"model": "small", "prompt": "a", "stream": True, "keep_alive": 1800,  # Continue
                           "options": {"num_predict": 2, "num_ctx": 8192, "num_thread": 4, "num_gqa": 1}}),
        ("/api/embed", {"model": "small:latest", "input": ["a"], "truncate": True, "keep_alive": "5m"}),
        # Open WebUI, where a model has settings; aider, by litellm; llm-ollama.
        ("/api/chat", {"model": "small:latest", "messages": user("a"), "stream": False, "think": "low", "options": {
            "num_predict": 2, "reasoning_effort": "low", "repeat_last_n": 64, "tfs_z": 1, "typical_p": 1.0}}),
        ("/api/chat", {"model": "small", "messages": [{**user("a")[0], "images": []}], "stream": True,
                       "options": {"num_predict": 2, "temperature": 0, "num_ctx": 9008}}),
        ("/api/chat", {"model": "small:latest", "stream": True, "tools": [], "messages": [*user("a"), {
            "role": "assistant", "content": None}, *user("b")], "options": {"num_predict": 2}}),
    ],
)  # fmt: skip
def test_bodies_of_other_clients_are_taken(url: str, path: str, body: dict[str, Any]) -> None:
    found = httpx.post(url + path, json=body, timeout=30)
    assert found.status_code == 200 and "error" not in found.text


def test_what_clients_add_to_a_conversation_is_read() -> None:
    thought = {"role": "assistant", "content": "b", "thinking": "hm"}
    body = OllamaChatRequest.model_validate({"system": "S", "messages": [*user("a"), thought, *user("c")]})
    assert [dict(message) for message in body.conversation().messages] == [
        {"role": "system", "content": "S"},
        *user("a"),
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        *user("c"),
    ]


def test_how_much_to_think_is_told_in_words_or_an_option() -> None:
    for fields in ({"think": "high"}, {"options": {"reasoning_effort": "high"}}):
        body = OllamaChatRequest.model_validate({"messages": user("a"), **fields})
        assert body.conversation().effort == "high"
    assert OllamaChatRequest.model_validate({"messages": user("a"), "think": True}).conversation().effort is None


def test_loaded_models_are_told_as_ollamas_clients_read_them(url: str) -> None:
    assert httpx.post(f"{url}/api/generate", json={"model": NAME, "stream": False}, timeout=30).status_code == 200
    (found,) = httpx.get(f"{url}/api/ps").json()["models"]
    (tag,) = httpx.get(f"{url}/api/tags").json()["models"]
    assert found["size_vram"] == found["size"] > 0 and found["context_length"] > 0
    assert found["expires_at"] and found["digest"] == tag["digest"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_without_a_prompt_loads_the_model(url: str, stream: bool) -> None:
    found = httpx.post(f"{url}/api/generate", json={"model": NAME, "keep_alive": 0, "stream": stream}, timeout=30)
    told = found.json()
    assert (told["response"], told["done"], told["done_reason"]) == ("", True, "load")


def test_a_stream_is_a_line_a_piece_and_can_be_left(url: str) -> None:
    body = {"messages": user("Hi"), "options": {"num_predict": -1}}
    with httpx.stream("POST", f"{url}/api/chat", json=body, timeout=30) as stream:
        assert stream.headers["content-type"].startswith("application/x-ndjson")
        assert json.loads(next(stream.iter_lines()))["done"] is False
    settle(url, 0)
    assert httpx.post(f"{url}/api/show", json={"name": NAME}, timeout=30).json()["details"]["format"] == "mlx"
    assert httpx.get(f"{url}/api/version").json()["version"]
