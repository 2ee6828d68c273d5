"""How models are told of tools and call them: what stands in the prompt, what an answer may be.

A model that was trained to call tools has a form for it: Mistral's control tokens, or a chat
template that knows tools and <tool_call>. All others are told in a system message, in words and
tags that many open models were trained on, and a grammar sees to it that what they call is there.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypedDict

from m7mlx.grammar import Grammar, json_rule
from m7mlx.tokens.messages import Message, parse_json
from m7mlx.tokens.mistral_format import MistralFormat
from m7mlx.tokens.template_format import TemplateFormat
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tools.calls import MARK
from m7mlx.tools.schema import calls_schema

ToolUse = Literal["none", "allowed", "required"]  # whether an answer may, or must, call tools
OPEN, CLOSE = "<tool_call>", "</tool_call>"
# The words that Qwen and Hermes models were trained on.
_TOLD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class Rules:
    """What an answer with tools may be.

    functions    those that may be called
    is_required  whether one must be called
    parallel     whether several may be called at once
    answer       the JSON schema of an answer that calls none
    """

    functions: Sequence[Mapping[str, Any]]
    is_required: bool
    parallel: bool
    answer: Mapping[str, Any] | None


class ToldOptions(TypedDict):
    """What else a model is told of the answer (`ChatFormat.encode`)."""

    effort: str | None
    schema: Mapping[str, Any] | None


class CallForm(ABC):
    """The form in which one model reads of tools, and calls them."""

    @abstractmethod
    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        is_required: bool,
        told: ToldOptions,
    ) -> list[int]:
        """The ids of a conversation with tools. Raises ChatFormatError."""

    @abstractmethod
    def schema(self, rules: Rules) -> Mapping[str, Any] | Grammar | None:
        """What an answer must follow, beside what the model was trained for."""


class MarkedCalls(CallForm):
    """Mistral's form: the control token [TOOL_CALLS], then a list of calls.

    From v11 on a name follows, [ARGS] and the arguments; each call has a [TOOL_CALLS] of its own.
    """

    def __init__(self, tokenizer: Tokenizer, mark: int) -> None:
        self.mark, self._tokenizer = mark, tokenizer

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        is_required: bool,
        told: ToldOptions,
    ) -> list[int]:
        ids = self._tokenizer.chat.encode(messages, tools, **told)
        return [*ids, self.mark] if is_required else ids

    def schema(self, rules: Rules) -> Mapping[str, Any] | Grammar | None:
        if not rules.is_required and rules.answer is None:
            return None
        if self._tokenizer.names_calls:
            calls = self._named_calls(rules)
        else:
            schema = calls_schema(rules.functions, rules.parallel)
            if rules.is_required:
                return schema
            calls = [f"calls: {json_rule(schema)}"]
        if rules.answer is None or rules.is_required:
            return Grammar("\n".join(["start: calls", *calls]))
        either = f"start: <[{self.mark}]> calls | answer"
        return Grammar("\n".join([either, *calls, f"answer: {json_rule(rules.answer)}"]))

    def _named_calls(self, rules: Rules) -> list[str]:
        """The rules for calls by name. Arguments are always an object."""
        args = self._tokenizer.control_id("[ARGS]")
        lines = [f"calls: call (<[{self.mark}]> call)*" if rules.parallel else "calls: call"]
        lines.append("call: " + " | ".join(f"call{n}" for n in range(len(rules.functions))))
        for n, function in enumerate(rules.functions):
            arguments = json_rule({**function["parameters"], "type": "object"})
            lines.append(f"call{n}: {json.dumps(function['name'])} <[{args}]> {arguments}")
        return lines


class TaggedCalls(CallForm):
    """Calls as JSON between <tool_call> and </tool_call>, each on lines of its own.

    in_template  whether the model's chat template tells of tools, and writes what became of them;
                 else messages do
    """

    def __init__(self, tokenizer: Tokenizer, in_template: bool) -> None:
        self._tokenizer, self._in_template = tokenizer, in_template

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        is_required: bool,
        told: ToldOptions,
    ) -> list[int]:
        chat = self._tokenizer.chat
        if self._in_template:
            return chat.encode(messages, tools, **told)
        return chat.encode(in_words(messages, tools), **told)

    def schema(self, rules: Rules) -> Grammar:
        calls = calls_schema(rules.functions, parallel=True)
        call = {**calls["items"], "$defs": calls["$defs"]}
        more = "call*" if rules.parallel else ""
        lines = [
            f'call: "{OPEN}\\n" rest',
            # What a schema asks for beyond the grammar's means is not enforced: agents give what
            # they have.
            f'rest: {json_rule(call, is_lenient=True)} "\\n{CLOSE}" END',
            "END: /\\n?/",
        ]
        if rules.is_required:
            return Grammar("\n".join([f"start: call {more}", *lines]))
        if rules.answer is not None:
            return Grammar("\n".join([f"start: call {more} | answer", *lines, f"answer: {json_rule(rules.answer)}"]))
        anything, once, twice = (f"/{'(?s:.*)' + (OPEN + '(?s:.*)') * times}/" for times in range(3))
        words = [
            f"start: TEXT | LEAD rest {more}",
            f"TEXT: {anything} & ~{once}",
            f"LEAD: /(?s:.*){OPEN}\\n/ & ~{twice}",
        ]
        return Grammar("\n".join([*words, *lines]), is_whole=False)


def call_form(tokenizer: Tokenizer) -> CallForm:
    """The form for a model with this tokenizer."""
    chat, mark = tokenizer.chat, tokenizer.control_id(MARK)
    if isinstance(chat, TemplateFormat):
        if mark is not None and chat.mentions("tools"):
            return MarkedCalls(tokenizer, mark)
        return TaggedCalls(tokenizer, chat.mentions("tools") and chat.mentions(OPEN))
    is_v1 = isinstance(chat, MistralFormat) and chat.version == "v1"
    return TaggedCalls(tokenizer, False) if mark is None or is_v1 else MarkedCalls(tokenizer, mark)


def in_words(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """A conversation with tools in messages that every chat format has: plain text.

    Tools stand at the end of the first system message, calls in the assistant's, and what they gave
    in the user's. Raises ChatFormatError where calls nest too deep.
    """
    told = [_in_words(message) for message in messages]
    if tools:
        words = _TOLD.format(tools="\n".join(map(_json, tools)))
        if told[0]["role"] == "system":
            told[0]["content"] = f"{told[0]['content']}\n\n{words}" if told[0]["content"] else words
        else:
            told.insert(0, {"role": "system", "content": words})
    joined: list[dict[str, Any]] = []
    for is_result, run in groupby(told, key=lambda message: bool(message.pop("is_result", False))):
        group = list(run)
        if is_result:
            joined.append({"role": "user", "content": "\n".join(message["content"] for message in group)})
        else:
            joined += group
    return joined


def _in_words(message: Message) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"content": f"<tool_response>\n{message['content']}\n</tool_response>", "is_result": True}
    told = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = parse_json(function.get("arguments") or "{}")
        calls.append(f"{OPEN}\n{_json({'name': function['name'], 'arguments': arguments})}\n{CLOSE}")
    text = message.get("content") or ""
    return told | {"content": "\n".join([text, *calls] if text else calls)}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
