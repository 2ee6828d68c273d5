"""Mistral's instruct formats, v1 to v15: messages → ids.

v1        [INST] and [/INST] as text; the system prompt in the first question
v2, v3    control tokens; the system prompt in the last question; tools and calls as JSON
v7        the system prompt between tokens of its own, wherever it stands; results by call
v11       calls as name, [CALL_ID], id, [ARGS], arguments
v13       no ids of calls; tools at the first question; thoughts between [THINK] and [/THINK]
v15       settings, such as how much to think, between [MODEL_SETTINGS] and [/MODEL_SETTINGS]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from m7mlx.errors import ChatFormatError
from m7mlx.tokens.messages import ChatFormat, Message, check_messages, is_continued, parse_json
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tokens.turns import Thought, Turn, in_call_order, join_turns
from m7mlx.tokens.versions import Version, number_of


class MistralFormat(ChatFormat):
    """One of Mistral's instruct formats; its ids equal those of mistral-common.

    settings  which settings the model is told, as in tekken.json (`model_settings_builder`)
    """

    def __init__(self, tokenizer: Tokenizer, version: Version, settings: Mapping[str, Any] | None = None) -> None:
        self.version, self._number = version, number_of(version)
        self._tokenizer, self._settings = tokenizer, settings or {}
        self._bos, self._eos = self._control("<s>"), self._control("</s>")
        self._thinks = self._number >= 13 and {"[THINK]", "[/THINK]"} <= tokenizer.control_ids().keys()

    def __repr__(self) -> str:
        return f"MistralFormat({self.version})"

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        effort: str | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> list[int]:
        check_messages(messages)
        if self._number == 1 and (tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)):
            raise ChatFormatError("tools need Mistral's v3 format (Mistral-7B-Instruct-v0.3)")
        turns = self._turns(messages)
        if turns[-1].role == "assistant" and not is_continued(messages):
            raise ChatFormatError(
                "the last message must be the user's or a tool's, for the model to answer, or the assistant's with "
                '"prefix": true, for the model to continue'
            )
        users = [i for i, turn in enumerate(turns) if turn.role == "user"] or [-1]
        told = self._tools(tools) + self._told_settings(effort, schema)
        teller = users[0] if self._number >= 13 else users[-1]
        ids = [self._bos]
        for i, turn in enumerate(turns):
            if turn.role == "user":
                ids += (told if i == teller else []) + self._user(turn)
            elif turn.role == "system":
                ids += self._block("[SYSTEM_PROMPT]", self._content(turn.content), "[/SYSTEM_PROMPT]")
            elif turn.role == "assistant":
                ids += self._assistant(turn, in_past=i < users[-1])
            else:
                ids += self._tool_result(turn, in_past=i < users[-1])
        return ids[:-1] if is_continued(messages) else ids  # without the end of the last message

    def _turns(self, messages: Sequence[Message]) -> list[Turn]:
        keeps_system = self._number >= 7
        turns = join_turns(messages, keeps_system=keeps_system, between_parts="" if self._number >= 15 else "\n\n")
        for turn in turns:
            if turn.role == "assistant":
                turn.content = turn.content if self._thinks else [turn.text] if turn.text else []
            elif not (turn.is_plain or self._thinks):
                raise ChatFormatError("the model's format has no place for thoughts in a system prompt")
        if not keeps_system:
            # The system prompt goes into the first question in v1, into the last from v2 on.
            asked = [turn for turn in turns if turn.role == "user"]
            carrier = asked[0 if self._number == 1 else -1]
            systems = [_plain_text(m) for m in messages if m["role"] == "system"]
            if system := "\n\n".join(text for text in systems if text):
                carrier.content = [f"{system}\n\n{carrier.text}"]
        return in_call_order(turns) if self._number >= 11 else turns

    @property
    def takes_effort(self) -> bool:
        return bool(self._settings.get("reasoning_effort"))

    def _tools(self, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        if not tools:
            return []
        return self._block("[AVAILABLE_TOOLS]", self._text(_tools_json(tools)), "[/AVAILABLE_TOOLS]")

    def _told_settings(self, effort: str | None, schema: Mapping[str, Any] | None) -> list[int]:
        told: dict[str, Any] = {}
        efforts: Any = self._settings.get("reasoning_effort")
        if effort is not None and not efforts:
            raise ChatFormatError("this model cannot be told how much to think; leave out reasoning_effort")
        if efforts:
            effort = efforts.get("default") if effort is None else effort
            if effort not in efforts.get("values", ()):
                known = ", ".join(map(str, efforts.get("values", ())))
                raise ChatFormatError(f"reasoning_effort must be one of {known} for this model")
            told["reasoning_effort"] = effort
        if self._settings.get("json_schema") and schema is not None:
            told["json_schema"] = schema
        if not told:
            return []
        text = _json({key: told[key] for key in sorted(told)})
        return self._block("[MODEL_SETTINGS]", self._text(text), "[/MODEL_SETTINGS]")

    def _user(self, turn: Turn) -> list[int]:
        if self._number == 1:
            return self._text(f"[INST] {turn.text} [/INST]")
        return self._block("[INST]", self._text(turn.text), "[/INST]")

    def _assistant(self, turn: Turn, in_past: bool) -> list[int]:
        if turn.calls and self._number == 2 and in_past:
            return []  # v2 keeps tool calls only after the last user message
        if turn.ids and not turn.calls:
            return [*turn.ids, self._eos]
        content = [turn.text.rstrip(" ")] if turn.is_plain and self._number > 1 else turn.content
        return [*self._content([part for part in content if part]), *self._calls(turn.calls), self._eos]

    def _content(self, content: Sequence[str | Thought]) -> list[int]:
        ids: list[int] = []
        for part in content:
            if isinstance(part, Thought):
                ids += self._block("[THINK]", self._text(part.text), "[/THINK]" if part.is_closed else None)
            else:
                ids += self._text(part)
        return ids

    def _calls(self, calls: Sequence[Mapping[str, Any]]) -> list[int]:
        written = [self._call(call) for call in calls]
        if self._number < 11:
            return self._block("[TOOL_CALLS]", self._text(_json(written))) if calls else []
        ids: list[int] = []
        for call in written:
            ids += self._block("[TOOL_CALLS]", self._text(call["name"]))
            if "id" in call:
                ids += self._block("[CALL_ID]", self._text(call["id"]))
            ids += self._block("[ARGS]", self._text(_json(call["arguments"])))
        return ids

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call as it is written: its id in v3 to v11 only."""
        function = call["function"]
        written = {"name": function["name"], "arguments": parse_json(function.get("arguments") or "{}")}
        if 3 <= self._number < 13 and call.get("id") not in (None, "", "null"):
            written["id"] = call["id"]
        return written

    def _tool_result(self, turn: Turn, in_past: bool) -> list[int]:
        if self._number >= 7:
            called: list[int] = []
            if self._number < 13:
                if turn.call_id is None:
                    raise ChatFormatError("a tool message has no tool_call_id, which says what call it answers")
                called = [*self._text(turn.call_id), self._control("[TOOL_CONTENT]")]
            return self._block("[TOOL_RESULTS]", [*called, *self._text(turn.text)], "[/TOOL_RESULTS]")
        content = parse_json(turn.text or "{}")
        if self._number == 2:
            if in_past:
                return []
            text = _json([{"name": turn.name, "content": content}])
        else:
            text = _json({"content": content, "call_id": turn.call_id})
        return self._block("[TOOL_RESULTS]", self._text(text), "[/TOOL_RESULTS]")

    def _text(self, text: str) -> list[int]:
        """Return the ids of a text: whatever it holds, it stays text."""
        return self._tokenizer.encode(text)

    def _block(self, begin: str, ids: Sequence[int], end: str | None = None) -> list[int]:
        return [self._control(begin), *ids, *([self._control(end)] if end else [])]

    def _control(self, name: str) -> int:
        token = self._tokenizer.control_id(name)
        if token is None:
            raise ChatFormatError(f"the tokenizer has no {name} token")
        return token


def _plain_text(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n\n".join(part["text"] for part in content if part.get("text"))


def _tools_json(tools: Sequence[Mapping[str, Any]]) -> str:
    """Write OpenAI-style tools as JSON, in the key order of mistral-common's models."""
    written = []
    for tool in tools:
        function = tool["function"]
        entry = {k: function.get(k, "") for k in ("name", "description")}
        written.append({"type": "function", "function": entry | {"parameters": function["parameters"]}})
    return _json(written)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
