"""Answers as clients get them from a server of its own, through the real `openai` client."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageParam,
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionToolMessageParam,
)
from openai.types.shared_params import ResponseFormatJSONSchema
from schemas import PERSON, object_of
from serving import CHAT, ENDLESS, NAME, Question, client, open_requests, serving, settle, user

from m7mlx import Sampling, load, stream_generate


def alone(folder: Path, text: str, tokens: int, **sampling: Any) -> str:
    model, tokenizer = load(folder)
    pieces = stream_generate(model, tokenizer, user(text), max_tokens=tokens, sampling=Sampling(**sampling))
    return "".join(piece.text for piece in pieces)


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
        usage = api.completions.create(model=NAME, prompt="a").usage
        assert usage and usage.completion_tokens <= 16


class BegunMessage(ChatCompletionAssistantMessageParam):
    """A message as Mistral's API takes it, with a field that OpenAI's does not have."""

    prefix: bool


def test_a_message_of_the_assistant_is_continued(url: str, model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    begun: BegunMessage = {"role": "assistant", "content": "Once upon", "prefix": True}
    messages: list[ChatCompletionMessageParam] = [*user("Hello"), begun]
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


def test_json_is_enforced_even_of_a_model_that_knows_nothing(url: str) -> None:
    wanted: ResponseFormatJSONSchema = {
        "type": "json_schema",
        "json_schema": {"name": "person", "schema": PERSON, "strict": True},
    }
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


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
TOOLS: list[ChatCompletionFunctionToolParam] = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in (
        ("weather", object_of(city={"type": "string", "maxLength": 8})),
        ("add", object_of(a=DIGIT, b=DIGIT)),
    )
]


class WithTools(Question):
    tools: list[ChatCompletionFunctionToolParam]
    seed: int


def test_tools_that_must_be_called_are_called(url: str) -> None:
    with client(url) as api:
        options: WithTools = {
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
        named: ChatCompletionNamedToolChoiceParam = {"type": "function", "function": {"name": "add"}}
        stream = api.chat.completions.create(**options, tool_choice=named, stream=True, parallel_tool_calls=False)
        name, arguments, reason = "", "", None
        for chunk in stream:
            for part in chunk.choices[0].delta.tool_calls or []:
                assert part.index == 0 and part.function
                name += part.function.name or ""
                arguments += part.function.arguments or ""
            reason = chunk.choices[0].finish_reason or reason
        assert (name, reason) == ("add", "tool_calls")
        assert set(json.loads(arguments)) == {"a", "b"}
        # What was called and what came of it goes back into the conversation.
        said = cast(ChatCompletionAssistantMessageParam, found.choices[0].message.model_dump(exclude_none=True))
        result: ChatCompletionToolMessageParam = {"role": "tool", "tool_call_id": call.id, "content": '{"sum": 5}'}
        history: list[ChatCompletionMessageParam] = [*user("2 + 3?"), said, result]
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


def test_whoever_leaves_gives_the_place_back(url: str) -> None:
    """Streams are closed, time runs out, tasks are cancelled: in the queue and in the middle."""
    with client(url) as api:
        going = [api.chat.completions.create(**ENDLESS, stream=True) for _ in range(4)]  # all rows
        for stream in going:
            next(iter(stream))
        for is_streamed in (False, True):  # they wait, and wait in vain
            with pytest.raises(openai.APITimeoutError):
                api.with_options(timeout=0.3).chat.completions.create(**ENDLESS, stream=is_streamed)
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


@pytest.mark.demo
def test_the_demo_model_answers(demo_model: Path) -> None:
    with serving(demo_model) as (url, _), client(url) as api:
        question = user("What is the capital of France?")
        found = api.chat.completions.create(model=NAME, messages=question, temperature=0, max_tokens=20)
        assert "Paris" in (found.choices[0].message.content or "")
