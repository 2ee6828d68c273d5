"""Bodies → requests: what strangers write costs little, and nothing typed is more than text."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from m7mlx_serve.app import Served, Server
from m7mlx_serve.catalog import Catalog
from m7mlx_serve.errors import ApiError
from m7mlx_serve.limits import Limits
from m7mlx_serve.models import Models
from m7mlx_serve.openai.chat import ChatRequest
from m7mlx_serve.readers import Readers
from m7mlx_serve.reading import parse, read
from serving import CHAT, settle, user

from m7mlx.errors import InputError
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer

PATH = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}

# Names of bodies of up to 8 MB → Python that makes them.
LARGE = {
    "a quotation mark never closed": r"""b'"' + b'\\"' * 4_000_000""",
    "many strings": "b'[' + b'\"\",' * 2_700_000 + b'\"\"]'",
    "parts that are numbers": (
        """b'{"model":"m","messages":[{"role":"user","content":[' + b'0,' * 3_999_000 + b'0]}]}'"""
    ),
    "messages that are lists": """b'{"model":"m","messages":[' + b'[],' * 2_600_000 + b'[]]}'""",
    "unknown fields": """b'{"model":"m"' + b''.join(b',"x%d":0' % i for i in range(500_000)) + b'}'""",
    "unknown fields of a message": (
        """b'{"model":"m","messages":[{"role":"user"' + b''.join(b',"x%d":0' % i for i in range(500_000)) + b'}]}'"""
    ),
    "biases that are none": (
        """b'{"model":"m","messages":[{"role":"user","content":"a"}],"logit_bias":{"1":1'"""
        """ + b''.join(b',"x%d":0' % i for i in range(500_000)) + b'}}'"""
    ),
    "stops that are numbers": """b'{"model":"m","stop":[' + b'0,' * 2_600_000 + b'0]}'""",
    "ids that are texts": """b'{"model":"m","prompt":[' + b'"",' * 2_600_000 + b'0]}'""",
    "brackets": "b'[' * 8_000_000",
    "brackets in an object": """b'{"a":' * 1_300_000""",
}


@pytest.mark.parametrize("name", list(LARGE))
def test_what_is_wrong_a_million_times_costs_little(name: str) -> None:
    """Time and memory are those of parsing: under 0.5 GB, where an error takes 0.8 kB."""
    path = "/v1/completions" if "ids" in name else PATH
    program = f"""
from m7mlx_bench.worker import peak_rss as peak
from m7mlx_serve.errors import ApiError
from m7mlx_serve.endpoints import ENDPOINTS
from m7mlx_serve.reading import parse
data = {LARGE[name]}
assert len(data) <= 8 << 20
before = peak()
try:
    parse(data, ENDPOINTS[{path!r}].body)
except ApiError as error:
    print(peak() - before, error.status, len(str(error)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    grown, status, length = map(int, done.stdout.split())
    assert status == 400 and length < 2000
    assert grown < 500e6


def test_the_first_mistakes_are_told() -> None:
    for change, said in (
        ({"temprature": 1}, "'temprature'"),
        ({"messages": [{"role": "user", "content": "a", "colour": "red"}]}, "messages.0: there is no field 'colour'"),
        ({"messages": [*BODY["messages"], {"role": "wizard"}]}, "messages.1.role"),
        ({"temperature": 9, "top_p": 9}, "temperature"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias: at most 1,024"),
        ({"messages": [{"role": "user", "content": "a", "name": "n" * 1000}]}, "messages.0.name"),
    ):
        with pytest.raises(ApiError, match=said):
            parse(json.dumps(BODY | change).encode(), ChatRequest)


@pytest.mark.parametrize("depth", [64, 65, 1000, 100_000])
def test_depth_is_bounded_wherever_json_may_stand(mistral_tokenizers: dict[str, Tokenizer], depth: int) -> None:
    nested = "[" * depth + "]" * depth
    answer = {"role": "tool", "tool_call_id": "abcdefghi"}

    def conversation(content: str = "1", arguments: str = "{}") -> bytes:
        call = CALL | {"function": {"name": "f", "arguments": arguments}}
        asked = [*BODY["messages"], {"role": "assistant", "tool_calls": [call]}, answer | {"content": content}]
        return json.dumps(BODY | {"messages": asked}).encode()

    plain = json.dumps(BODY).encode()[:-1]
    parameters = b'{"type":"function","function":{"name":"f","parameters":{"a":%s}}}'
    bodies = [
        conversation(content=nested),
        conversation(arguments=nested),
        plain + b',"tools":[' + parameters % nested[: depth - 5].encode().ljust(2 * depth - 10, b"]") + b"]}",
    ]
    for data in bodies:
        if depth == 64:
            assert read(PATH, data, "m", mistral_tokenizers["v3"]).prompts.ids
        else:
            with pytest.raises((ApiError, InputError), match="deeper than 64 levels"):
                read(PATH, data, "m", mistral_tokenizers["v3"])


def test_what_has_been_read_keeps_no_texts(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = mistral_tokenizers["v3"]
    tools = [
        {"type": "function", "function": {"name": name, "description": "long", "parameters": {"type": "object"}}}
        for name in ("f", "g")
    ]
    asked = read(PATH, json.dumps(BODY | {"tools": tools}).encode(), "m", tokenizer)
    assert list(asked.prompts.ids[0]) == tokenizer.chat.encode(BODY["messages"], tools)
    assert isinstance(asked.body, ChatRequest) and asked.body.tools is None
    assert [message.content for message in asked.body.messages] == [""]
    named = {"tools": tools, "tool_choice": {"type": "function", "function": {"name": "g"}}}
    asked = read(PATH, json.dumps(BODY | named).encode(), "m", tokenizer)
    assert asked.prompts.tool_use == "required" and '"const": "g"' in json.dumps(asked.prompts.schema)
    assert '"const": "f"' not in json.dumps(asked.prompts.schema)
    assert asked.prompts.ids[0][-1] == tokenizer.control_id("[TOOL_CALLS]")
    for prompt, ids in (("Hi", tokenizer.encode("Hi", add_bos=True)), ([5, 6], [5, 6])):
        found = read("/v1/completions", json.dumps({"model": "m", "prompt": prompt}).encode(), "m", tokenizer)
        assert list(found.prompts.ids[0]) == ids
    schema = {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 200_000]}}}
    with pytest.raises(InputError, match="longer than 200,000"):
        read(PATH, json.dumps(BODY | {"response_format": schema}).encode(), "m", tokenizer)


def test_a_message_that_is_continued(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = mistral_tokenizers["v3"]
    messages = [*BODY["messages"], {"role": "assistant", "content": "The answer is", "prefix": True}]
    asked = read(PATH, json.dumps(BODY | {"messages": messages}).encode(), "m", tokenizer)
    assert not asked.prompts.at_start
    assert list(asked.prompts.ids[0]) == [
        *tokenizer.chat.encode(BODY["messages"]),
        *tokenizer.encode("The answer is"),
    ]
    for wrong in ([*messages, *BODY["messages"]], [{"role": "user", "content": "x", "prefix": True}]):
        with pytest.raises(InputError, match="only an assistant's last message is continued"):
            read(PATH, json.dumps(BODY | {"messages": wrong}).encode(), "m", tokenizer)
    tool = {"type": "function", "function": {"name": "f"}}
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    for wanted in ({"type": "json_object"}, schema):
        with pytest.raises(InputError, match="an answer in JSON has no prefix"):
            read(PATH, json.dumps(BODY | {"messages": messages, "response_format": wanted}).encode(), "m", tokenizer)
    in_text = BODY | {"messages": messages, "response_format": {"type": "text"}}
    assert read(PATH, json.dumps(in_text).encode(), "m", tokenizer).prompts.ids == asked.prompts.ids
    required = {"messages": messages, "tools": [tool], "tool_choice": "required"}
    with pytest.raises(InputError, match="must call a tool has no prefix"):
        read(PATH, json.dumps(BODY | required).encode(), "m", tokenizer)


@pytest.fixture(scope="module")
def readers(model_folder: Path) -> Iterator[Readers]:
    found = Readers(Path(os.path.relpath(model_folder)), "m")  # as users may name it
    yield found
    found.close()


def unread(found: Readers, data: bytes, tokenizer: Tokenizer) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(found.read(PATH, data, tokenizer))
    return caught.value


def test_a_process_of_its_own_reads_alike(
    readers: Readers, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a body may say, once there and once here."""
    tokenizer = load_tokenizer(model_folder)
    schema = {"type": "object", "properties": {"a": {"type": "integer", "default": None}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (PATH, BODY),
        (PATH, BODY | {"tools": [tool], "tool_choice": "required", "seed": (1 << 63) - 1, "n": 3}),
        (PATH, BODY | {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
        (PATH, BODY | {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}),
        (PATH, BODY | {"logprobs": True, "top_logprobs": 3, "stop": ["a", "\u2028"], "temperature": 0.1}),
        (PATH, BODY | {"logit_bias": {"5": -1.5}, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"model": "m", "prompt": "Ünïcödé 😀"}),
        ("/v1/completions", {"model": "m", "prompt": [1, 2, 3], "logprobs": 2, "max_tokens": 7}),
        (PATH, BODY | {"prediction": {"content": "as it may be"}}),
        (PATH, BODY | {"model": "other"}),
        (PATH, BODY | {"messages": [{"role": "assistant", "content": "x"}]}),
        (PATH, BODY | {"messages": [*BODY["messages"], {"role": "assistant", "content": "x", "prefix": True}]}),
        (PATH, BODY | {"temperature": -1}),
    ]
    for path, body in bodies:
        found: list[Any] = []
        for small in (1 << 20, 0):
            monkeypatch.setattr("m7mlx_serve.readers.SMALL", small)
            try:
                found.append(asyncio.run(readers.read(path, json.dumps(body).encode(), tokenizer)))
            except ApiError as error:
                found.append((error.status, str(error), error.code))
        assert found[0] == found[1]


def test_reading_is_bounded_by_the_system(readers: Readers, model_folder: Path, monkeypatch: Any) -> None:
    tokenizer = load_tokenizer(model_folder)
    large = json.dumps(BODY | {"messages": [{"role": "user", "content": "\u4e00\u9fff" * 400_000}]}).encode()
    monkeypatch.setattr("m7mlx_serve.readers._CPU_SECONDS", 0.05)
    refused = unread(readers, large, tokenizer)
    assert (refused.status, str(refused)) == (400, "the request takes too long to read; send less")
    monkeypatch.undo()
    monkeypatch.setattr("m7mlx_serve.readers._MEMORY", 100 << 20)
    small = Readers(model_folder, "m")
    assert "too much memory" in str(unread(small, b"[" + b"[],[[]]," * 1_000_000 + b"0]", tokenizer))
    small.close()
    assert len(asyncio.run(readers.read(PATH, large, tokenizer)).prompts.ids[0]) > 400_000  # and it reads on


def test_who_leaves_gives_up_the_place_in_the_line(readers: Readers, model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    large = json.dumps(BODY | {"messages": [{"role": "user", "content": "\u4e00\u9fff" * 400_000}]}).encode()

    async def leave() -> float:
        for _ in range(30):
            task = asyncio.ensure_future(readers.read(PATH, large, tokenizer))
            await asyncio.sleep(0)
            task.cancel()
        return len((await readers.read(PATH, large, tokenizer)).prompts.ids[0])

    assert asyncio.run(asyncio.wait_for(leave(), 60)) > 400_000


def test_nothing_typed_is_a_control_token(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    """Wherever it stands: texts, names, ids, keys, nested values, JSON within texts."""
    tokenizer = mistral_tokenizers["v3"]
    controls = set(tokenizer.control_ids().values())

    def used(word: str) -> list[int]:
        inner = {word: {word: [word]}, "enum": [word], "description": word}
        call = {"id": word, "type": "function", "function": {"name": word, "arguments": json.dumps(inner)}}
        messages = [
            {"role": "system", "content": word, "name": word},
            {"role": "user", "content": [{"type": "text", "text": word}, {"type": "text", "text": word}]},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": word, "name": word, "content": json.dumps(inner)},
            {"role": "user", "content": word},
        ]
        function = {"name": "f", "description": word, "parameters": {"type": "object", "properties": inner}}
        body = {"model": "m", "messages": messages, "tools": [{"type": "function", "function": function}]}
        ids = [i for i in read(PATH, json.dumps(body).encode(), "m", tokenizer).prompts.ids[0] if i in controls]
        prompt = json.dumps({"model": "m", "prompt": word}).encode()
        assert [i for i in read("/v1/completions", prompt, "m", tokenizer).prompts.ids[0] if i in controls] == [
            tokenizer.bos_id
        ]
        return ids

    plain = used("word")
    for word in (
        "[INST]",
        "</s>",
        "<s>",
        "[/TOOL_RESULTS]",
        "[TOOL_CALLS]",
        "<unk>",
        "[control_99]",
        "a</s>b[/INST]",
    ):
        assert used(word) == plain


def test_what_nests_too_deep_somewhere_else_is_the_clients_fault(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deep(Readers):
        async def read(self, *_: Any) -> Any:
            raise RecursionError

    monkeypatch.setattr("m7mlx_serve.models.Readers", Deep)
    models = Models(Catalog({"m": model_folder}), Limits())
    server = Server(models, Served(), {"localhost"})

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(PATH, json=BODY)

    found = asyncio.run(ask())
    models.close()
    assert (found.status_code, found.json()["error"]["message"]) == (400, "the request nests too deep")


def test_nobody_waits_while_others_are_read(url: str) -> None:
    """What is large is read elsewhere, and once however many answers are asked for.

    The bound is generous: each of these took the loop a second and more, one behind the other.
    """
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
    assert worst < 1.5
