"""m7mlx-serve as its clients meet it: a process of its own, the real `openai` client, raw HTTP, what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from processes import running

from m7mlx import Sampling, load, stream_generate

NAME = "small"


@contextmanager
def serving(folder: Path, *options: str, files: int | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's address and its process, which may have so many files."""
    command = [sys.executable, "-m", "m7mlx_serve", "--model", str(folder), "--name", NAME, "--port", "0", *options]
    if files is not None:
        command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
    with running(command, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"http://\S+", line):
                yield found[0], process
                break
        else:
            raise AssertionError(said)


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    with serving(model_folder, "--rows", "4") as (found, _):
        yield found


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def alone(folder: Path, text: str, tokens: int, **sampling: Any) -> str:
    model, tokenizer = load(folder)
    pieces = stream_generate(model, tokenizer, user(text), max_tokens=tokens, sampling=Sampling(**sampling))
    return "".join(piece.text for piece in pieces)


def open_requests(url: str) -> float:
    found = re.search(r"^m7mlx_open_requests (\S+)", httpx.get(f"{url}/metrics").text, re.M)
    assert found
    return float(found[1])


def test_answers_are_those_of_the_library(url: str, model_folder: Path) -> None:
    with client(url) as api:
        assert [model.id for model in api.models.list()] == [NAME]
        assert api.models.retrieve(NAME).owned_by == "m7mlx"
        whole = api.chat.completions.create(model=NAME, messages=user("Hello"), temperature=0, max_tokens=12)
        expected = alone(model_folder, "Hello", 12)
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].finish_reason in ("length", "stop")
        assert whole.usage and whole.usage.completion_tokens <= 12
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        stream = api.chat.completions.create(
            model=NAME,
            messages=user("Hello"),
            temperature=0,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert chunks[-1].usage.prompt_tokens_details
        # The prompt has just been read, but by whom is nobody's business.
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 0
        assert whole.usage.prompt_tokens_details and whole.usage.prompt_tokens_details.cached_tokens == 0


def test_texts_and_ids_are_gone_on_with(url: str, model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    expected = "".join(p.text for p in stream_generate(model, tokenizer, "Once upon", max_tokens=9))
    ids = tokenizer.encode("Once upon", add_bos=True)
    with client(url) as api:
        for prompt in ("Once upon", ids):
            found = api.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=9)
            assert found.choices[0].text == expected
        stream = api.completions.create(model=NAME, prompt=ids, temperature=0, max_tokens=9, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
        assert api.completions.create(model=NAME, prompt="a").usage.completion_tokens <= 16  # type: ignore[union-attr]


def test_a_message_of_the_assistant_is_continued(url: str, model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    messages = [*user("Hello"), {"role": "assistant", "content": "Once upon", "prefix": True}]
    with client(url) as api:
        answer = api.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=12)
    pieces = stream_generate(model, tokenizer, messages, max_tokens=12, sampling=Sampling())
    assert answer.choices[0].message.content == "".join(piece.text for piece in pieces)


def test_several_answers_differ_and_a_seed_repeats_them(url: str) -> None:
    def three() -> list[str | None]:
        with client(url) as api:
            found = api.chat.completions.create(
                model=NAME, messages=user("Hi"), n=3, seed=7, temperature=1.5, max_tokens=8
            )
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        return [choice.message.content for choice in found.choices]

    assert three() == three()
    assert len(set(three())) == 3
    with client(url) as api:
        stream = api.chat.completions.create(
            model=NAME, messages=user("Hi"), n=3, seed=7, temperature=1.5, max_tokens=8, stream=True
        )
        texts = ["", "", ""]
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == three()


def test_many_at_once_get_their_own_answers(url: str, model_folder: Path) -> None:
    """More than there are rows; every third goes away in the middle."""
    model, tokenizer = load(model_folder)
    questions = [f"Question {i}: {'why? ' * (i % 7)}" for i in range(18)]
    expected = ["".join(p.text for p in stream_generate(model, tokenizer, user(q), max_tokens=20)) for q in questions]

    def ask(i: int) -> str:
        with client(url) as api:
            stream = api.chat.completions.create(
                model=NAME, messages=user(questions[i]), temperature=0, max_tokens=20, stream=True
            )
            text = ""
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if i % 3 == 2 and text:
                    stream.close()
                    break
        return text

    with ThreadPoolExecutor(len(questions)) as pool:
        found = list(pool.map(ask, range(len(questions))))
    for i, (text, wanted) in enumerate(zip(found, expected, strict=True)):
        assert wanted.startswith(text) if i % 3 == 2 else text == wanted
    settle(url, 0)  # those that went away have given their places back


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_json_is_enforced_even_of_a_model_that_knows_nothing(url: str) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    with client(url) as api:
        for seed in range(4):
            found = api.chat.completions.create(
                model=NAME, messages=user("Who?"), response_format=wanted, seed=seed, max_tokens=400, temperature=1
            )
            assert found.choices[0].finish_reason == "stop"
            person = json.loads(found.choices[0].message.content or "")
            assert set(person) == {"name", "age"} and isinstance(person["age"], int)
        stream = api.chat.completions.create(
            model=NAME,
            messages=user("Who?"),
            response_format=wanted,
            seed=3,
            max_tokens=400,
            temperature=1,
            stream=True,
        )
        assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in stream)) == person
        biased = api.chat.completions.create(
            model=NAME, messages=user("?"), response_format={"type": "json_object"}, max_tokens=30, temperature=0
        )
        assert (biased.choices[0].message.content or "").startswith("{")


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {**SCHEMA, "properties": properties, "required": [*properties]}},
    }
    for name, properties in (
        ("weather", {"city": {"type": "string", "maxLength": 8}}),
        (
            "add",
            {
                "a": {"type": "integer", "minimum": 0, "maximum": 9},
                "b": {"type": "integer", "minimum": 0, "maximum": 9},
            },
        ),
    )
]


def test_tools_that_must_be_called_are_called(url: str) -> None:
    with client(url) as api:
        options: dict[str, Any] = {
            "model": NAME,
            "messages": user("2 + 3?"),
            "tools": TOOLS,
            "seed": 1,
            "max_tokens": 300,
        }
        found = api.chat.completions.create(**options, tool_choice="required", parallel_tool_calls=False)
        (call,) = found.choices[0].message.tool_calls or []
        assert found.choices[0].finish_reason == "tool_calls"
        assert re.fullmatch("[A-Za-z0-9]{9}", call.id)
        assert call.type == "function" and call.function.name in ("weather", "add")
        named = {"type": "function", "function": {"name": "add"}}
        stream = api.chat.completions.create(**options, tool_choice=named, stream=True, parallel_tool_calls=False)
        name, arguments, reason = "", "", None
        for chunk in stream:
            for part in chunk.choices[0].delta.tool_calls or []:
                assert part.index == 0
                name += part.function.name or ""  # type: ignore[union-attr]
                arguments += part.function.arguments or ""  # type: ignore[union-attr]
            reason = chunk.choices[0].finish_reason or reason
        assert (name, reason) == ("add", "tool_calls")
        assert set(json.loads(arguments)) == {"a", "b"}
        # What was called and what came of it goes back into the conversation.
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"sum": 5}'}
        history = [*user("2 + 3?"), found.choices[0].message.model_dump(exclude_none=True), result]
        again = api.chat.completions.create(model=NAME, messages=history, tools=TOOLS, max_tokens=4)
        assert again.usage and again.usage.prompt_tokens > (found.usage.prompt_tokens if found.usage else 0)
        without = api.chat.completions.create(**options, tool_choice="none")
        assert without.choices[0].message.tool_calls is None


def test_log_probabilities_and_bias(url: str, model_folder: Path) -> None:
    with client(url) as api:
        found = api.chat.completions.create(
            model=NAME, messages=user("Hi"), temperature=0, max_tokens=6, logprobs=True, top_logprobs=4
        )
        content = (found.choices[0].logprobs.content if found.choices[0].logprobs else None) or []
        assert len(content) == 6
        for scored in content:
            assert len(scored.top_logprobs) == 4
            assert scored.logprob == scored.top_logprobs[0].logprob < 0  # greedy: the likeliest
            assert scored.token.encode() == bytes(scored.bytes or []) or "\ufffd" in scored.token
        model, tokenizer = load(model_folder)
        ids = tokenizer.chat.encode(user("Hi"))
        banned = next(iter(stream_generate(model, tokenizer, ids, max_tokens=1))).ids[0]
        other = api.chat.completions.create(
            model=NAME, messages=user("Hi"), temperature=0, max_tokens=6, logit_bias={str(banned): -100}
        )
        assert other.choices[0].message.content != found.choices[0].message.content
        text = api.completions.create(model=NAME, prompt="Hi", temperature=0, max_tokens=3, logprobs=2)
        assert text.choices[0].logprobs and len(text.choices[0].logprobs.token_logprobs or []) == 3
        pieces, offsets = text.choices[0].logprobs.tokens or [], text.choices[0].logprobs.text_offset or []
        assert offsets[0] == 0 and offsets == sorted(offsets) and len(set(offsets)) > 1
        assert text.choices[0].text[offsets[1] :].startswith(pieces[1].rstrip("\ufffd"))
        streamed = api.chat.completions.create(
            model=NAME, messages=user("Hi"), temperature=0, max_tokens=6, logprobs=True, stream=True
        )
        parts = [c.choices[0].logprobs.content for c in streamed if c.choices[0].logprobs]
        assert [s.logprob for part in parts for s in part or []] == pytest.approx(
            [s.logprob for s in content], abs=1e-4
        )


def schema(wanted: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": wanted}}}


CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no messages": ({"messages": []}, 400, "messages"),
    "another model": ({"model": "/etc"}, 404, "not served here"),
    "a repository": ({"model": "evil/repo"}, 404, "not served here"),
    "negative temperature": ({"temperature": -1}, 400, "temperature"),
    "n of 0": ({"n": 0}, 400, "n: "),
    "too many": ({"n": 9}, 400, "n: "),
    "logit_bias": ({"logit_bias": {"99999999": 5}}, 400, "logit_bias"),
    "response_format": ({"response_format": {"type": "yaml"}}, 400, "response_format"),
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "zebra"}}}},
        400,
        "the JSON schema cannot be used",
    ),
    "a schema left out": ({"response_format": {"type": "json_schema"}}, 400, "json_schema"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools"),
    "no tools to call": ({"tool_choice": "required"}, 400, "there are no tools"),
    "logprobs": ({"top_logprobs": 3}, 400, "logprobs"),
    "too many logprobs": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "a word to bias": ({"logit_bias": {"cat": 5}}, 400, "logit_bias"),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    "empty stop": ({"stop": ""}, 400, "stop"),
    "unknown field": ({"temprature": 1}, 400, "temprature"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1"}}]}]},
        400,
        "messages",
    ),
    "a role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role"),
    "two system messages at the end": ({"messages": [{"role": "assistant", "content": "x"}]}, 400, ""),
    "stream_options alone": ({"stream_options": {"include_usage": True}}, 400, "stream"),
    "many stops": ({"stop": [f"s{i}" for i in range(65)]}, 400, "stop"),
    "a stop of 4 MB": ({"stop": "x" * 4_000_000}, 400, "stop"),
    "a bias for everybody": ({"logit_bias": {str(i): 1 for i in range(2000)}}, 400, "logit_bias"),
    "a bias in other digits": ({"logit_bias": {"٣": 1}}, 400, "logit_bias"),
    "one that fails of several": ({"n": 8, "logit_bias": {"99999999": 1}}, 400, "vocabulary"),
    "a message of 4 MB": ({"messages": user("word " * 790_000)}, 400, "messages"),
    "7 MB of messages": ({"messages": user("x" * 990_000) * 7}, 400, "characters are more than"),
    "a schema that is itself": (schema({"$ref": "#"}), 400, "nothing fits it"),
    "a schema from elsewhere": (schema({"$ref": "http://10.0.0.1/x"}), 400, "cannot be used"),
    "a schema of this machine's": (schema({"$ref": "file:///etc/passwd"}), 400, "cannot be used"),
    "a schema of too many others": (
        schema({"allOf": [{"anyOf": [{"required": [f"p{i}{j}"]} for j in range(6)]} for i in range(9)]}),
        400,
        "cannot be used",
    ),
    "a schema and tools": (schema({}) | {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    "true for a number": ({"max_tokens": True}, 400, "max_tokens"),
    "a number for true": ({"logprobs": 1}, 400, "logprobs"),
    "a fraction for a number": ({"n": 1.0}, 400, "n: "),
    "a large seed": ({"seed": 1 << 63}, 400, "seed"),
    "text for a number": ({"max_tokens": "many"}, 400, "max_tokens"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", list(REFUSED))
def test_requests_that_cannot_be_met_are_refused(url: str, name: str, stream: bool) -> None:
    changes, status, reason = REFUSED[name]
    if "stream_options" in changes and stream:
        return
    found = httpx.post(f"{url}/v1/chat/completions", json=CHAT | changes | {"stream": stream}, timeout=30)
    assert found.status_code == status
    error = found.json()["error"]
    assert reason in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("field", "status"),
    [
        (b'"temperature": 1e400', 400),
        (b'"temperature": 1e-400', 200),
        (b'"temperature": -0.0', 200),
        (b'"temperature": 9, "temperature": 0', 200),  # the last one counts
        (b'"seed": ' + b"9" * 5000, 400),
        (b'"user": "\xf0\x9f\x98\x80\xe2\x80\xae\\u0000"', 200),
        (b'"stop": "\\u0000"', 200),
        (b'"stop": "\\ud800"', 400),
        (b'"\\uDFFF": 1', 400),
        (b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["\\ud800"]}}}', 400),
        (b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "number", "maximum": 1e999}}}', 400),  # noqa: E501
        (b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "^(a+)+$"}}}', 200),
        (b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"maxItems": 1000000000}}}', 200),
    ],
)  # fmt: skip
def test_what_json_can_say(url: str, field: bytes, status: int) -> None:
    body = json.dumps(CHAT).encode()[:-1] + b", " + field + b"}"
    found = httpx.post(
        f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}, timeout=30
    )
    assert found.status_code == status


def test_ids_outside_the_vocabulary_never_reach_the_model(url: str) -> None:
    for ids in ([10_000_000], [-1], [1 << 70]):
        found = httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": ids}, timeout=30)
        assert found.status_code == 400
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"\xff\xfe{}", {}, 400),
        (b"", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"a":' * 100 + b"1" + b"}" * 100, {}, 400),
        (json.dumps(CHAT | {"temperature": float("nan")}).encode(), {}, 400),
        (json.dumps(CHAT).encode(), {"Content-Type": "text/plain"}, 415),
        (json.dumps(CHAT).encode(), {"Host": "evil.example"}, 403),
        (json.dumps(CHAT).encode(), {"Host": "127.0.0.1.evil.example:80"}, 403),
        (json.dumps(CHAT).encode(), {"Origin": "http://evil.example"}, 403),
        (json.dumps(CHAT).encode(), {"Origin": "null"}, 403),
        (b" " * (9 << 20), {}, 413),
        (b'"' + b"[" * 1000 + b'"', {}, 400),  # brackets in a string are no depth
        (b'"' + b'\\"' * 100_000, {}, 400),  # a string without an end
    ],
)
def test_what_is_sent_is_bounded(url: str, body: bytes, headers: dict[str, str], status: int) -> None:
    given = {"Content-Type": "application/json"} | headers
    found = httpx.post(f"{url}/v1/chat/completions", content=body, headers=given, timeout=30)
    assert found.status_code == status
    assert found.json()["error"]["message"]
    assert "access-control-allow-origin" not in found.headers


def test_nobody_waits_while_others_are_read(url: str) -> None:
    """What is large is parsed and tokenised elsewhere, and once however many answers are asked for. The bound is
    generous: each of these took the loop a second and more."""
    text = "".join(chr(0x4E00 + i * 7919 % 20_000) for i in range(990_000))
    bodies = [
        json.dumps(CHAT | {"messages": user(text), "n": 8}).encode(),
        b"[" + b"[]," * 2_700_000 + b"0]",
        b'{"messages":[' + b"{}," * 2_700_000 + b"{}]}",
    ]

    def ask(body: bytes) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            headers = {"Content-Type": "application/json"}
            httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=6)

    worst = 0.0
    with ThreadPoolExecutor(3) as pool, httpx.Client(timeout=60) as other:
        asked = [pool.submit(ask, body) for body in bodies]
        while not all(one.done() for one in asked):
            began = time.perf_counter()
            assert other.get(f"{url}/health").status_code == 200
            worst = max(worst, time.perf_counter() - began)
            time.sleep(0.02)
    settle(url, 0)
    assert worst < 0.5


def test_lengths_that_lie(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    for length, status in ((b"-1", b"400"), (b"99999999999", b"413"), (b"x", b"400")):
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: " + length + b"\r\n\r\n{}"
            )
            assert status in raw.recv(100).splitlines()[0]


def test_paths_and_methods_that_are_not_there(url: str) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/x", 404),
    ):
        found = httpx.request(method, url + path)
        assert (found.status_code, found.json()["error"]["type"]) == (status, "invalid_request_error")


def test_the_page_may_run_nothing_but_its_own(url: str) -> None:
    page = httpx.get(url)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script src=" in page.text and "onclick" not in page.text
    assert httpx.get(f"{url}/page.js").headers["content-type"].startswith("text/javascript")
    assert "innerHTML" not in httpx.get(f"{url}/page.js").text
    assert httpx.get(f"{url}/page.css").status_code == 200


def test_the_api_describes_itself(url: str) -> None:
    data = httpx.get(f"{url}/openapi.json").json()
    assert data["openapi"].startswith("3.1")
    assert set(data["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
    text = json.dumps(data)
    for name in re.findall(r'#/components/schemas/([^"]+)', text):
        assert name in data["components"]["schemas"]
    fields = data["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "tools", "response_format", "logit_bias", "stream"} <= set(fields)
    shown = httpx.get(f"{url}/docs")
    assert "POST /v1/chat/completions" in shown.text
    assert "default-src 'none'" in shown.headers["content-security-policy"]


def test_more_than_may_wait_are_told_to_come_back(model_folder: Path) -> None:
    with serving(model_folder, "--rows", "1", "--queue", "1") as (url, _), client(url) as api:
        going = [
            api.chat.completions.create(
                model=NAME, messages=user("Hi"), max_tokens=4000, temperature=1.2, stream=True, extra_body={"seed": i}
            )
            for i in range(1)
        ]
        next(iter(going[0]))
        waiting = threading.Thread(
            target=lambda: httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60), daemon=True
        )
        waiting.start()
        until = time.monotonic() + 10
        while open_requests(url) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        for stream in (False, True):
            found = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": stream}, timeout=30)
            assert found.status_code == 429
            assert int(found.headers["retry-after"]) > 0
        going[0].close()
        waiting.join(30)
        assert not waiting.is_alive()  # the place of the one that left was taken


def test_a_key_is_asked_for(model_folder: Path, tmp_path: Path) -> None:
    key = "a-key-of-some-length-1234"
    (tmp_path / "key").write_text(key + "\n")
    with serving(model_folder, "--api-key-file", str(tmp_path / "key")) as (url, _):
        for path, status in (("/health", 200), ("/", 200), ("/v1/models", 401), ("/metrics", 401)):
            assert httpx.get(url + path).status_code == status
        with pytest.raises(openai.AuthenticationError), client(url, "wrong") as api:
            api.models.list()
        with client(url, key) as api:
            assert api.chat.completions.create(model=NAME, messages=user("Hi"), max_tokens=1).choices


ENDLESS = {
    "model": NAME,
    "messages": user("Hi"),
    "temperature": 0,
    "max_tokens": 1_000_000,
    "logit_bias": {"2": -100},
}


def settle(url: str, count: int) -> None:
    """Wait until so many requests are open."""
    until = time.monotonic() + 20
    while open_requests(url) != count:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_whoever_leaves_gives_the_place_back(url: str) -> None:
    """A stream that is closed, a time-out, a task that is cancelled; in the queue, and in the middle."""
    with client(url) as api:
        going = [api.chat.completions.create(**ENDLESS, stream=True) for _ in range(4)]  # all rows
        for stream in going:
            next(iter(stream))
        for stream in (False, True):  # they wait, and wait in vain
            with pytest.raises(openai.APITimeoutError):
                api.with_options(timeout=0.3).chat.completions.create(**ENDLESS, stream=stream)
            settle(url, 4)

        async def cancelled(stream: bool) -> None:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as other:
                task = asyncio.create_task(other.chat.completions.create(**ENDLESS, stream=stream))
                while await asyncio.to_thread(open_requests, url) < 5:
                    await asyncio.sleep(0.02)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(cancelled(False))
        settle(url, 4)
        asyncio.run(cancelled(True))
        settle(url, 4)
        for stream in going:
            stream.close()
        settle(url, 0)
        with pytest.raises(openai.APITimeoutError):  # a row of its own
            api.with_options(timeout=0.5).chat.completions.create(**ENDLESS, n=3)
        settle(url, 0)
        assert api.chat.completions.create(model=NAME, messages=user("Hi"), max_tokens=2).choices


def figures(url: str) -> dict[str, float]:
    found = re.findall(r"^(m7mlx_[^ #]+) (\S+)$", httpx.get(f"{url}/metrics").text, re.M)
    return {name: float(value) for name, value in found}


def test_metrics(url: str) -> None:
    before = figures(url)
    with client(url) as api:
        question: Any = CHAT | {"temperature": 0, "max_tokens": 5, "logit_bias": {"2": -100}}
        whole = api.chat.completions.create(**question)
        list(api.chat.completions.create(**question, stream=True))
        left = api.chat.completions.create(**ENDLESS, stream=True)
        for _ in range(4):
            next(left)
        running = figures(url)
        left.close()
        settle(url, 0)
        assert whole.usage
    for path in ("/v1/chat/completions", "/v1/what/ever", "/no/such/path"):
        httpx.post(url + path, json={})
    httpx.get(f"{url}/v1/models/x")
    httpx.get(url, headers={"Host": "evil.example"})
    after = figures(url)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    def requests(path: str, status: int) -> float:
        return more(f'm7mlx_requests_total{{path="{path}",status="{status}"}}')

    assert (requests("/v1/chat/completions", 200), requests("/v1/chat/completions", 400)) == (3, 1)
    assert (requests("other", 404), requests("/v1/models/…", 404), requests("/", 403)) == (2, 1, 1)
    assert running["m7mlx_requests_running"] == 1 and running["m7mlx_requests_waiting"] == 0
    assert (after["m7mlx_requests_running"], after["m7mlx_open_requests"]) == (0, 0)
    assert more('m7mlx_tokens_total{kind="prompt"}') == 3 * whole.usage.prompt_tokens
    assert more('m7mlx_tokens_total{kind="generated"}') >= 5 + 5 + 3  # of the one that was left, as far as it came
    assert not any("reused" in name or "cached" in name for name in after)
    assert more('m7mlx_answers_total{reason="length"}') == 2 and more('m7mlx_answers_total{reason="left"}') == 1
    assert more("m7mlx_time_to_first_token_seconds_count") == 3
    assert more("m7mlx_time_per_output_token_seconds_count") == 3
    assert more("m7mlx_time_per_output_token_seconds_sum") > 0


def closed(url: str) -> None:
    """Wait until nobody new is let in."""
    host, port = url.removeprefix("http://").split(":")
    until = time.monotonic() + 20
    while True:
        try:
            socket.create_connection((host, int(port))).close()
        except ConnectionError:
            return
        assert time.monotonic() < until
        time.sleep(0.02)


def test_ending_under_load(model_folder: Path) -> None:
    """What can finish finishes; the rest is told; nobody new is let in; and it is no failure."""
    with serving(model_folder, "--rows", "4") as (url, process):
        asked = {
            "short stream": {"stream": True, "max_tokens": 300},
            "short": {"max_tokens": 300},
            "endless stream": {"stream": True},
            "endless": {},
        }
        with ThreadPoolExecutor(4) as pool:
            going = {
                name: pool.submit(httpx.post, f"{url}/v1/chat/completions", json=ENDLESS | changes, timeout=60)
                for name, changes in asked.items()
            }
            settle(url, 4)
            process.send_signal(signal.SIGTERM)
            closed(url)
            assert process.wait(40) == 0
            found = {name: one.result(10) for name, one in going.items()}
        assert found["short stream"].text.endswith("data: [DONE]\n\n")
        assert found["short"].json()["usage"]["completion_tokens"] == 300
        *_, before, last = found["endless stream"].text.strip().split("\n\n")
        assert json.loads(before[6:])["choices"]
        assert json.loads(last[6:])["error"]["code"] == "shutting_down"
        assert found["endless"].status_code == 503
        assert found["endless"].json()["error"]["code"] == "shutting_down"


def test_ending_at_once(model_folder: Path) -> None:
    """A second signal waits for nobody."""
    with serving(model_folder, "--rows", "2") as (url, process), client(url) as api:
        stream = api.chat.completions.create(**ENDLESS, stream=True)
        next(stream)
        process.send_signal(signal.SIGINT)
        closed(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(8) == -signal.SIGINT
        stream.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "give a key with --api-key-file"),
        (["--rows", "0"], "--rows must lie between"),
        (["--port", "99999"], "--port must lie between"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--api-key-file", "/no/such/key"], "cannot be read"),
        (["--max-tokens", "0"], "--max-tokens"),
    ],
)
def test_bad_options_are_one_line(options: list[str], reason: str) -> None:
    command = [sys.executable, "-m", "m7mlx_serve", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "m7mlx_serve", "--model", str(model_folder), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "cannot be opened" in done.stderr.splitlines()[-1]
    assert "loading" not in done.stderr


def test_an_address_with_colons(model_folder: Path) -> None:
    """What is printed can be opened."""
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        with serving(model_folder, "--host", "::1") as (url, _):
            assert httpx.get(f"{url}/health").status_code == 200
            port = url.rpartition(":")[2]
            command = [sys.executable, "-m", "m7mlx_serve", "--model", str(model_folder)]
            again = [*command, "--host", "::1", "--port", port]
            done = subprocess.run(again, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 1
            assert f"[::1]:{port} cannot be opened" in done.stderr.splitlines()[-1]
        return
    pytest.skip("this machine has no ::1")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_standard_streams_that_are_closed(model_folder: Path, closed: str) -> None:
    """As some that start services leave them; what goes wrong later has nowhere to be said, and ends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = f"""
import sys, m7mlx_serve.reading_process
from m7mlx_serve import answers
def breaks(*_): raise KeyError("unforeseen")
answers._sampling = breaks
from m7mlx_serve.cli import main
sys.exit(main(["--model", {str(model_folder)!r}, "--name", {NAME!r}, "--port", "{port}"]))
"""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", program]
    with running(command, stdout=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        for _ in range(2):
            body = {"model": NAME, "messages": user("Hi"), "max_tokens": 2}
            found = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
            assert found.status_code == 500 and "error" in found.json()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stdout.read() == b""


def test_control_c_while_the_model_is_loaded(model_folder: Path) -> None:
    """What loads is not waited for: a model may take minutes."""
    program = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import m7mlx_serve.engine
from m7mlx_serve.cli import main
m7mlx_serve.engine.load = lambda folder: time.sleep(60)
sys.exit(main(["--model", {str(model_folder)!r}, "--port", "0"]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert process.stderr.readline().startswith("loading")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == "m7mlx-serve: stopped while loading\n"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.demo
def test_the_demo_model_answers(demo_model: Path) -> None:
    with serving(demo_model) as (url, _), client(url) as api:
        question = user("What is the capital of France?")
        found = api.chat.completions.create(model=NAME, messages=question, temperature=0, max_tokens=20)
        assert "Paris" in (found.choices[0].message.content or "")
