"""Mistral's instruct formats v1, v2 and v3: messages → ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from m7mlx.errors import ChatFormatError
from m7mlx.tokens.messages import ChatFormat, Message, check_messages, is_continued, parse_json
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tokens.tokenizer_sentencepiece import SentencePieceTokenizer

Version = Literal["v1", "v2", "v3"]


def mistral_version(tokenizer: Tokenizer) -> Version | None:
    """Return the version of Mistral's instruct format that a tokenizer could be made for, or None.

    v1 (models v0.1 and v0.2) writes [INST] as text, v2 and v3 have control tokens for it; from v7
    on there is one for the system prompt, too. No weights were released for v2: it is recognised by
    the file's name, tokenizer.model.v2.
    """
    names = tokenizer.control_ids()
    if not {"<s>", "</s>"} <= names.keys() or "[SYSTEM_PROMPT]" in names:
        return None
    if {"[INST]", "[/INST]"} <= names.keys():
        is_v2 = isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.path.suffix == ".v2"
        return "v2" if is_v2 else "v3"
    return "v1" if tokenizer.vocab_size >= 32000 and tokenizer.encode("[INST]") == [733, 16289, 28793] else None


class MistralFormat(ChatFormat):
    """One of Mistral's instruct formats; its ids equal those of mistral-common."""

    def __init__(self, tokenizer: Tokenizer, version: Version) -> None:
        self.version = version
        self._tokenizer = tokenizer
        self._bos, self._eos = self._control("<s>"), self._control("</s>")

    def __repr__(self) -> str:
        return f"MistralFormat({self.version})"

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        check_messages(messages)
        if self.version == "v1" and (tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)):
            raise ChatFormatError("tools need Mistral's v3 format (Mistral-7B-Instruct-v0.3)")
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system" and m["content"])
        turns = _merge_turns(messages)
        if turns[-1]["role"] == "assistant" and not is_continued(messages):
            raise ChatFormatError(
                "the last message must be the user's or a tool's, for the model to answer, or the assistant's with "
                '"prefix": true, for the model to continue'
            )
        users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
        ids = [self._bos]
        for i, turn in enumerate(turns):
            if turn["role"] == "user":
                # The system prompt goes into the first user turn in v1, into the last from v2 on.
                carries = users[0] if self.version == "v1" else users[-1]
                text = f"{system}\n\n{turn['content']}" if system and i == carries else turn["content"]
                ids += self._user(text, tools if i == users[-1] else ())
            elif turn["role"] == "assistant":
                ids += self._assistant(turn, in_past=i < users[-1])
            else:
                ids += self._tool_result(turn, in_past=i < users[-1])
        return ids[:-1] if is_continued(messages) else ids  # without the end of the last message

    def _user(self, text: str, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        if self.version == "v1":
            return self._tokenizer.encode(f"[INST] {text} [/INST]")
        ids = self._block("[AVAILABLE_TOOLS]", _tools_json(tools), "[/AVAILABLE_TOOLS]") if tools else []
        return ids + self._block("[INST]", text, "[/INST]")

    def _assistant(self, turn: Message, in_past: bool) -> list[int]:
        if turn.get("tool_calls"):
            if self.version == "v2" and in_past:
                return []  # v2 keeps tool calls only after the last user message
            calls = self._block("[TOOL_CALLS]", self._calls_json(turn["tool_calls"]))
            return [*self._tokenizer.encode(turn["content"]), *calls, self._eos]
        if turn.get("ids"):
            return [*turn["ids"], self._eos]
        text = turn["content"] if self.version == "v1" else turn["content"].rstrip(" ")
        return [*self._tokenizer.encode(text), self._eos]

    def _tool_result(self, turn: Message, in_past: bool) -> list[int]:
        content = parse_json(turn["content"] or "{}")
        if self.version == "v2":
            if in_past:
                return []
            text = _json([{"name": turn.get("name"), "content": content}])
        else:
            text = _json({"content": content, "call_id": turn.get("tool_call_id")})
        return self._block("[TOOL_RESULTS]", text, "[/TOOL_RESULTS]")

    def _calls_json(self, calls: Sequence[Mapping[str, Any]]) -> str:
        written = []
        for call in calls:
            function = call["function"]
            arguments = function.get("arguments") or "{}"
            entry = {"name": function["name"], "arguments": parse_json(arguments)}
            if self.version == "v3" and call.get("id") not in (None, "", "null"):
                entry["id"] = call["id"]
            written.append(entry)
        return _json(written)

    def _block(self, begin: str, text: str, end: str | None = None) -> list[int]:
        """Return the ids of a text between two control tokens; whatever it holds, it stays text."""
        first, last = self._control(begin), [self._control(end)] if end else []
        return [first, *self._tokenizer.encode(text), *last]

    def _control(self, name: str) -> int:
        token = self._tokenizer.control_id(name)
        if token is None:
            raise ChatFormatError(f"the tokenizer has no {name} token")
        return token


def _merge_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Join neighbours of one role by a blank line, except tool results; leave out system prompts.

    The first turn is always the user's, empty if need be.
    """
    turns: list[dict[str, Any]] = []
    for role, run in groupby(messages, key=lambda m: m["role"]):
        group = list(run)
        if role == "tool":
            turns += [dict(m) for m in group]
        elif role != "system":
            turn: dict[str, Any] = {
                "role": role,
                "content": "\n\n".join(m["content"] for m in group if m.get("content")),
            }
            if calls := [call for m in group for call in m.get("tool_calls") or ()]:
                turn["tool_calls"] = calls
            if len(group) == 1 and group[0].get("ids"):
                turn["ids"] = group[0]["ids"]
            turns.append(turn)
    if not turns or turns[0]["role"] != "user":
        turns.insert(0, {"role": "user", "content": ""})
    return turns


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
