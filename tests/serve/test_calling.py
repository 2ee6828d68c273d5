"""Tools on every model: how it is told of them, and that what it calls is there."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from conversations import CHATML
from hypothesis import given
from hypothesis import strategies as st
from m7mlx_serve.conversation import Conversation
from serving import NAME, client, serving, user
from tokenizer_folders import CONTROLS, byte_level_json, write_json_tokenizer

from m7mlx import Piece
from m7mlx.answer_reader import AnswerReader
from m7mlx.constrain import grammar_constraint
from m7mlx.errors import InputError
from m7mlx.grammar import Grammar
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.messages import Message
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tools.calling import OPEN, MarkedCalls, TaggedCalls, call_form, in_words

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
ADD: dict[str, Any] = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": DIGIT}, "required": ["a"], "additionalProperties": False},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
OTHER = CALL.replace("add", "sub")


@pytest.fixture(scope="module")
def bytes_only(chatml_folder: Path) -> Tokenizer:
    return load_tokenizer(chatml_folder)


def follows(tokenizer: Tokenizer, schema: Any, text: str) -> bool:
    """Whether a grammar lets a text be the whole answer."""
    assert isinstance(schema, Grammar)
    constraint = grammar_constraint(tokenizer, schema)
    try:
        for token in tokenizer.encode(text):
            if not constraint.mask(tokenizer.vocab_size)[token].item():
                return False
            constraint.accept(token)
        allowed = constraint.mask(tokenizer.vocab_size)
        return any(allowed[end].item() for end in tokenizer.eos_ids)
    finally:
        constraint.close()


def test_each_model_has_its_form(mistral_tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    assert isinstance(call_form(mistral_tokenizers["v3"]), MarkedCalls)
    assert isinstance(call_form(mistral_tokenizers["v1"]), TaggedCalls)
    hermes = "{% for t in tools or [] %}{{ t.function.name }}:<tool_call>{% endfor %}" + CHATML
    for template, is_told_by_template in (
        (CHATML, False),
        (hermes, True),
        (CHATML + "{% if tools %}{% endif %}", False),
    ):
        settings = {"eos_token": "<|im_end|>", "chat_template": template}
        tokenizer = write_json_tokenizer(tmp_path, byte_level_json(CONTROLS), settings)
        ids = Conversation(user("Hi"), [ADD]).prompts(tokenizer).ids[0]
        told = tokenizer.decode(ids)
        assert ("# Tools" in told) != is_told_by_template
        assert told.startswith("add:<tool_call>") == is_told_by_template


def test_tools_are_told_in_words(bytes_only: Tokenizer) -> None:
    calls = [{"id": n, "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}} for n in "xy"]
    messages: list[Message] = [
        {"role": "system", "content": "S"},
        *user("1+1?"),
        {"role": "assistant", "content": "I see", "tool_calls": calls},
        *({"role": "tool", "tool_call_id": n, "content": "2"} for n in "xy"),
    ]
    told = in_words(messages, [{"type": "function", "function": ADD}])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("S\n\n# Tools") and json.dumps(ADD) in told[0]["content"]
    assert told[2]["content"] == f"I see\n{CALL}\n{CALL}"
    assert told[3]["content"] == "<tool_response>\n2\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    assert in_words(user("Hi"), [{"type": "function", "function": ADD}])[0]["role"] == "system"
    assert in_words(messages[:2]) == messages[:2]
    # What is answered continues what was read: the start of a conversation is not read again.
    before = Conversation(messages[:2], [ADD]).prompts(bytes_only).ids[0]
    after = Conversation(messages, [ADD]).prompts(bytes_only).ids[0]
    assert list(after[: len(before)]) == list(before)


def test_answers_keep_to_what_is_there(bytes_only: Tokenizer) -> None:
    free = Conversation(user("?"), [ADD]).prompts(bytes_only)
    assert free.tool_use == "allowed" and isinstance(free.schema, Grammar) and not free.schema.is_whole
    for text in ("Hello", "", "a < b <tool", CALL, f"I see.\n{CALL}", f"{CALL}\n{CALL}", "</tool_call> {}"):
        assert follows(bytes_only, free.schema, text), text
    for text in (OTHER, "<tool_call>", CALL[:-3], CALL.replace("1", "10"), f"{CALL}\nDone", CALL + OTHER):
        assert not follows(bytes_only, free.schema, text), text
    demanded = Conversation(user("?"), [ADD], "required", parallel=False).prompts(bytes_only).schema
    assert follows(bytes_only, demanded, CALL)
    assert not any(follows(bytes_only, demanded, text) for text in ("Hello", f"{CALL}\n{CALL}", f"I see.\n{CALL}"))
    either = Conversation(user("?"), [ADD], schema={"const": 7}).prompts(bytes_only).schema
    assert all(follows(bytes_only, either, text) for text in ("7", CALL, f"{CALL}\n{CALL}"))
    assert not any(follows(bytes_only, either, text) for text in ("8", "Hello", f"7{CALL}"))


def test_strangers_schemas_stay_json(bytes_only: Tokenizer) -> None:
    """Whatever their texts hold, they cannot get out of it; what cannot be enforced is left out."""
    for text in ('"}\nstart: /.*/', "%json", "// \n", '\\"', "</tool_call>", "\u2028"):
        parameters = {
            "type": "object",
            "properties": {text: {"const": text}},
            "required": [text],
            "description": text,
        }
        tool = ADD | {"parameters": parameters | {"additionalProperties": False, "not": {"const": 1}}}
        schema = Conversation(user("?"), [tool], "required").prompts(bytes_only).schema
        arguments = json.dumps({text: text}, ensure_ascii=False)
        call = f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call>'
        assert follows(bytes_only, schema, call) and not follows(bytes_only, schema, CALL)
    smuggled = ADD | {"parameters": {"x-guidance": {"lenient": True}}}
    with pytest.raises(InputError, match="x-guidance"):
        Conversation(user("?"), [smuggled]).prompts(bytes_only)


def test_v3_calls_or_answers_in_json(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = mistral_tokenizers["v3"]
    schema = Conversation(user("?"), [ADD], schema={"const": 7}).prompts(tokenizer).schema
    assert isinstance(schema, Grammar) and schema.is_whole
    constraint, mark = grammar_constraint(tokenizer, schema), tokenizer.control_id("[TOOL_CALLS]")
    assert mark is not None
    allowed = constraint.mask(tokenizer.vocab_size)
    assert allowed[mark].item() and not allowed[tokenizer.encode("8")[-1]].item()
    constraint.accept(mark)
    after = constraint.mask(tokenizer.vocab_size)
    assert after[tokenizer.encode("a[")[-1]].item() and not after[tokenizer.encode("a7")[-1]].item()
    constraint.close()


@given(
    before=st.text(alphabet="a <tol_c>\n", max_size=20).filter(lambda text: OPEN not in text),
    count=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_calls_in_text_are_read_however_it_is_cut(
    bytes_only: Tokenizer, before: str, count: int, cuts: list[int]
) -> None:
    text = before + "\n".join([CALL] * count)
    reader = AnswerReader(bytes_only, "allowed")
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    told = [reader.read(Piece(text[start:end], [9])) for start, end in itertools.pairwise(edges)]
    told.append(reader.read(Piece(finish_reason="stop")))
    assert [call["function"] for call in reader.calls] == [{"name": "add", "arguments": '{"a": 1}'}] * count
    assert "".join(one.text for one in told) == (before.rstrip() if count else before)
    assert reader.reason == ("tool_calls" if count else "stop")


def test_what_is_no_call_is_text(bytes_only: Tokenizer) -> None:
    for text in ("<tool_call> no, rather not", "<tool_call>", "x <tool_call>\n{"):
        reader = AnswerReader(bytes_only, "allowed")
        told = [reader.read(Piece(text)), reader.read(Piece(finish_reason="length"))]
        assert "".join(one.text for one in told).replace(" ", "") == text.replace(" ", "")
        assert not reader.calls and reader.reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_knows_no_tools_calls_them(chatml_url: str, stream: bool) -> None:
    tools: Any = [{"type": "function", "function": ADD}]
    body: dict[str, Any] = {"messages": user("1?"), "tools": tools, "tool_choice": "required", "max_tokens": 200}
    if not stream:
        found = httpx.post(f"{chatml_url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
        assert found["finish_reason"] in ("tool_calls", "length")
        assert found["message"]["tool_calls"][0]["function"]["name"] == "add"
        return
    with client(chatml_url) as api:
        chunks = list(api.chat.completions.create(model=NAME, stream=True, **body))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert calls[0].function.name == "add"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


@pytest.mark.demo
def test_the_demo_model_calls_tools(demo_model: Path) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": city}}]
    body = {"messages": user("How is the weather in Paris?"), "tools": tools, "tool_choice": "required"}
    with serving(demo_model) as (url, _):
        options = {"parallel_tool_calls": False, "temperature": 0, "max_tokens": 60}
        found = httpx.post(f"{url}/v1/chat/completions", json=body | options, timeout=280).json()
    (call,) = found["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
