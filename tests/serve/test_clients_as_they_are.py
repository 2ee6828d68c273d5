"""What clients really send is understood: fields that ask for nothing, lists, compressed bodies."""

from __future__ import annotations

import gzip
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from agent import check_agent
from serving import CHAT, NAME, client, serving, user

from m7mlx import load, stream_generate
from m7mlx.scoring import score

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
SAID = {"role": "assistant", "content": "b"}


def ask(url: str, path: str = CHATS, **changes: Any) -> httpx.Response:
    start = CHAT if path == CHATS else {"model": NAME, "max_tokens": 2}
    return httpx.post(url + path, json={**start, **changes}, timeout=60)


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix": False}, {"refusal": None, "annotations": [], "audio": None, "function_call": None},
        {"parsed": {"x": 1}}, {"reasoning_content": "hm", "anything": None}, {"content": ""},
        {"content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
    ],
)  # fmt: skip
def test_answers_are_taken_back_as_clients_put_them_back(url: str, changes: dict[str, Any]) -> None:
    found = ask(url, messages=[*user("a"), SAID | changes, *user("c")])
    assert found.status_code == 200, found.text


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text"], "best_of": 1, "top_logprobs": 0, "logit_bias": {}, "stop": [], "tools": []},
        {"stream_options": {"include_obfuscation": False}, "stream": True}, {"tool_choice": "auto"},
        {"num_ctx": 4096, "num_gpu": 0, "use_mmap": True, "keep_alive": "5m"},  # Open WebUI's settings
        {"random_seed": 3, "safe_prompt": True}, {"prediction": {"type": "content", "content": "Hello"}},
        {"reasoning_effort": "low", "verbosity": "medium"}, {"response_format": {"type": "text"}},
        {"model": None}, {"model": ""}, {"functions": [], "function_call": None, "parallel_tool_calls": True},
        {"response_format": {"type": "json_object", "value": {"const": 1}}},
        {"tools": [{"type": "function", "function": {"name": "f", "description": None, "strict": False}}]},
    ],
)  # fmt: skip
def test_what_asks_for_nothing_else_is_let_through(url: str, fields: dict[str, Any]) -> None:
    found = ask(url, **fields)
    assert found.status_code == 200, found.text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"modalities": ["text", "audio"]}, 'give ["text"]'), ({"functions": [{"name": "f"}]}, "tools"),
        ({"web_search_options": {}}, "web_search_options: the server fetches nothing"),
        ({"num_predict": 5}, "max_tokens"), ({"repeat_penalty": 1.1}, "repetition_penalty"),
        ({"verbosity": "high"}, "verbosity can only be 'medium' here"),
        ({"temperature": "hot"}, "temperature: must be a number"), ({"seed": 1, "random_seed": 2}, "one field"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content: must be a text or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "reads text alone"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role: must be 'system', "),
        ({"messages": "Hi"}, "messages: must be a list"), ({"n": 9}, "n: must be at most 8"),
        ({"model": "other"}, f"use '{NAME}', or leave it out"), ({"logit_bias": {"cat": 1}}, "id of a token"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told_in_words(url: str, fields: dict[str, Any], said: str) -> None:
    found = ask(url, **fields)
    message = found.json()["error"]["message"]
    assert found.status_code in (400, 404) and said in message
    assert not any(word in message for word in ("Input should", "Field required", "constrained", "pydantic", "Value"))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHATS, {"messages": user("x" * 9000)}), (TEXTS, {"prompt": "x" * 9000}),
        ("/v1/responses", {"input": "x" * 9000, "stream": True}), ("/api/chat", {"messages": user("x" * 9000)}),
        ("/v1/messages", {"messages": user("x" * 9000), "max_tokens": 5, "stream": True}),
    ],
)  # fmt: skip
def test_a_prompt_that_is_too_long_is_told_as_agents_read_it(
    chatml_url: str, path: str, body: dict[str, Any]
) -> None:
    """They shorten their conversation then: Claude Code by the numbers, Codex by the code."""
    found = httpx.post(chatml_url + path, json=body, timeout=30)
    told = re.search(r"prompt is too long[^0-9]*([0-9]+)\s*tokens?\s*>\s*([0-9]+)", found.text)
    assert found.status_code == 400 and told and int(told[1]) > int(told[2]) == 8192
    if path in (CHATS, TEXTS, "/v1/responses"):
        assert found.json()["error"]["code"] == "context_length_exceeded"
    if path == "/v1/messages":
        assert found.json()["error"]["type"] == "invalid_request_error"


def test_lists_of_prompts_get_a_choice_each(url: str, model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    texts = ["Once", "The end of"]
    expected = ["".join(p.text for p in stream_generate(model, tokenizer, text, max_tokens=5)) for text in texts]
    ids = [tokenizer.encode(text, add_bos=True) for text in texts]
    for prompt in (texts, ids):
        found = ask(url, TEXTS, prompt=prompt, max_tokens=5, temperature=0, n=2).json()
        assert [choice["text"] for choice in found["choices"]] == [text for text in expected for _ in range(2)]
        assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
        assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert ask(url, TEXTS, prompt=["a"] * 100).status_code == 400  # more than there are places
    assert "prompt" in ask(url, TEXTS, prompt=[]).json()["error"]["message"]


@pytest.mark.parametrize("tokens", [0, 3])
def test_prompts_are_told_with_their_log_probabilities(url: str, model_folder: Path, tokens: int) -> None:
    """They are those of m7mlx-eval, in both forms of an answer."""
    model, tokenizer = load(model_folder)
    text = "The quick brown fox jumps over the lazy dög"
    ids = tokenizer.encode(text, add_bos=True)
    fields: dict[str, Any] = {"prompt": [ids, ids[:1]], "max_tokens": tokens, "temperature": 0, "echo": True}
    long, short = ask(url, TEXTS, logprobs=1, **fields).json()["choices"]
    scores, expected = long["logprobs"], score(model, ids)
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert scores["token_logprobs"][1 : len(ids)] == pytest.approx(expected.logprobs.tolist(), abs=1e-3)
    likeliest = [max(top, key=top.get) for top in scores["top_logprobs"][1 : len(ids)]]
    is_likeliest = [a == b for a, b in zip(likeliest, scores["tokens"][1 : len(ids)], strict=True)]
    assert is_likeliest == expected.greedy.tolist()
    assert len(scores["tokens"]) == len(ids) + tokens and long["finish_reason"] == "length"
    assert long["text"].startswith(text)
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        assert "\ufffd" in token or long["text"].startswith(token.lstrip(), offset + (offset and token[:1] == " "))
    assert short["logprobs"]["token_logprobs"][0] is None and len(short["logprobs"]["tokens"]) == 1 + tokens
    with client(url) as api:
        chunks = list(api.completions.create(model=NAME, logprobs=1, stream=True, **fields))
    told = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == 0]
    assert "".join(choice.text for choice in told) == long["text"]
    streamed = [value for choice in told if choice.logprobs for value in choice.logprobs.token_logprobs or []]
    assert streamed[1:] == pytest.approx(scores["token_logprobs"][1:], abs=1e-3)
    assert ask(url, TEXTS, **fields).json()["choices"][0]["text"] == long["text"]
    assert ask(url, TEXTS, prompt="Hi", max_tokens=0).json()["choices"][0]["text"] == ""


def test_penalties_change_what_is_said_again(url: str) -> None:
    def said(**fields: Any) -> str:
        found = ask(url, messages=user("Hello"), temperature=0, max_tokens=40, **fields).json()
        return str(found["choices"][0]["message"]["content"])

    plain = said()
    assert said(presence_penalty=0, frequency_penalty=0.0) == plain
    assert said(presence_penalty=2) != plain or said(frequency_penalty=2) != plain


def test_bodies_come_in_many_wrappings(url: str) -> None:
    data, kind = json.dumps(CHAT).encode(), {"Content-Type": "application/json"}

    def post(content: bytes, coding: str | None = None, path: str = CHATS) -> httpx.Response:
        headers = kind | ({"Content-Encoding": coding} if coding else {})
        return httpx.post(url + path, content=content, headers=headers, timeout=30)

    assert post(b"\xef\xbb\xbf" + data).status_code == 200
    assert post(data, path=CHATS + "/").status_code == 200
    assert httpx.get(f"{url}/v1/models/").status_code == 200
    assert post(gzip.compress(data), "gzip").status_code == 200
    bomb = gzip.compress(b" " * (64 << 20))
    for content, coding, status in (
        (bomb, "gzip", 413),
        (gzip.compress(data)[:-4], "gzip", 400),
        (gzip.compress(data) + b"x", "gzip", 400),
        (data, "gzip", 400),
        (data, "br", 415),
        (data, "identity", 200),
    ):
        assert post(content, coding).status_code == status


def test_pages_of_other_origins_are_let_in_by_name(model_folder: Path) -> None:
    origin = "app://obsidian.md"
    with serving(model_folder, "--allow-origin", origin) as (url, _):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
        before = httpx.options(url + CHATS, headers=asked)
        assert before.status_code == 204 and before.headers["access-control-allow-headers"] == "x-a"
        found = httpx.post(url + CHATS, json=CHAT, headers={"Origin": origin}, timeout=30)
        assert found.status_code == 200 and found.headers["access-control-allow-origin"] == origin
        assert httpx.post(url + CHATS, json={}, headers={"Origin": origin}).headers["vary"] == "Origin"
        refused = httpx.options(url + CHATS, headers=asked | {"Origin": "https://evil.example"})
        assert refused.status_code == 403 and "--allow-origin" in refused.json()["error"]["message"]
        assert "access-control-allow-origin" not in refused.headers


# --- real clients ---------------------------------------------------------------------------------

clients = pytest.mark.clients
quiet = pytest.mark.filterwarnings("ignore")  # of other packages


@clients
@quiet
@pytest.mark.parametrize("server", ["url", "chatml_url"])
def test_mistrals_own_client(server: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(server)
    api = import_module("mistralai.client").Mistral(api_key="none", server_url=url)
    assert [card.id for card in api.models.list().data] == [NAME]
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    for _ in range(3):  # its answers go back as they are
        found = api.chat.complete(model=NAME, messages=messages, max_tokens=3, random_seed=1, safe_prompt=True)
        messages += [found.choices[0].message, {"role": "user", "content": "And?"}]
    assert found.usage.completion_tokens <= 3
    chunks = list(api.chat.stream(model=NAME, messages=messages, max_tokens=3, temperature=0))
    assert chunks[-1].data.choices[0].finish_reason
    number = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {"type": "object", "properties": {"a": number}, "required": ["a"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "add", "parameters": schema}}]
    called = api.chat.complete(
        model=NAME, messages=user("2?"), tools=tools, tool_choice="any", parallel_tool_calls=False, max_tokens=200
    )
    (call,) = called.choices[0].message.tool_calls
    assert call.function.name == "add" and set(json.loads(call.function.arguments)) == {"a"}
    result = {"role": "tool", "name": "add", "content": "4", "tool_call_id": call.id}
    history = [*user("2?"), called.choices[0].message, result]
    assert api.chat.complete(model=NAME, messages=history, tools=tools, max_tokens=2).choices


@clients
@quiet
def test_langchain_completes_texts_and_chats(url: str) -> None:
    package = import_module("langchain_openai")
    options = {"model": NAME, "base_url": f"{url}/v1", "api_key": "none", "max_tokens": 3}
    texts = package.OpenAI(**options)
    assert len(texts.generate(["Once", "The"]).generations) == 2
    chat = package.ChatOpenAI(**options, presence_penalty=0.5, frequency_penalty=0.1)
    said = chat.invoke("Hi")
    again = chat.invoke([("user", "Hi"), said, ("user", "And?")])
    assert again.usage_metadata["output_tokens"] <= 3
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chat.stream("Hi")) <= 3


@quiet  # of pydantic, which does not expect what openai puts into its models
def test_openais_helpers_put_answers_back(url: str, model_folder: Path) -> None:
    pydantic: Any = import_module("pydantic")
    person = pydantic.create_model("Person", is_known=(bool, ...))
    with client(url) as api:
        history: list[Any] = list(user("Who?"))
        parsed = api.chat.completions.parse(
            model=NAME, messages=history, response_format=person, temperature=0, max_tokens=300
        )
        message = parsed.choices[0].message
        assert isinstance(message.parsed, person)
        for put_back in (message, message.model_dump()):
            messages: list[Any] = [*history, put_back, *user("And?")]
            again = api.chat.completions.create(model=NAME, messages=messages, max_tokens=2)
            assert again.choices
        with api.chat.completions.stream(model=NAME, messages=history, response_format=person) as stream:
            stream.until_done()
            assert isinstance(stream.get_final_completion().choices[0].message.parsed, person)


@quiet
def test_huggingfaces_client(url: str) -> None:
    client: Any = import_module("huggingface_hub").InferenceClient(base_url=f"{url}/v1")
    format = {"type": "json_schema", "json_schema": {"name": "one", "schema": {"const": 1}}}
    found = client.chat_completion(user("Hi"), max_tokens=8, response_format=format)
    assert found.choices[0].message.content == "1"
    value = {"type": "json", "value": {"const": 1}}
    assert client.chat_completion(user("Hi"), max_tokens=8, response_format=value).choices[0].message.content == "1"


@clients
@quiet
@pytest.mark.parametrize("server", ["url", "chatml_url"])
async def test_agents_with_tools_and_an_output_type(server: str, request: pytest.FixtureRequest) -> None:
    """Either a call or the JSON comes, whatever the model."""
    await check_agent(request.getfixturevalue(server), "OpenAIChatCompletionsModel")


@clients
@quiet
def test_litellm(url: str) -> None:
    litellm: Any = import_module("litellm")
    options = {"model": f"openai/{NAME}", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 3}
    found = litellm.completion(messages=user("Hi"), presence_penalty=0.2, **options)
    history = [*user("Hi"), found.choices[0].message.model_dump(), *user("And?")]
    assert litellm.completion(messages=history, **options).choices[0].finish_reason
