"""Messages → ids: Mistral's instruct formats v1, v2 and v3, and any other model's own chat template.

A message is a mapping, as everywhere:

    {"role": "system" | "user" | "assistant" | "tool", "content": "text"}

An assistant message may hold `tool_calls` and a tool message `tool_call_id` and `name`, as in OpenAI's API. An
assistant message may hold `ids`: the ids it was generated as, without the end token. They are used as they are,
since the same text can be tokenised in other ways, which the cache would not recognise.

The last message may be an assistant's with `"prefix": True`, as in Mistral's API: the beginning of the answer, which
the model continues.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from m7mlx.errors import ChatFormatError

if TYPE_CHECKING:
    from m7mlx.tokens.tokenizer import Tokenizer

Message = Mapping[str, Any]
Version = Literal["v1", "v2", "v3"]
ROLES = ("system", "user", "assistant", "tool")
MAX_DEPTH = 64  # of lists and objects in what tools are given and give back
_NESTED = (dict, list, tuple)


class ChatFormat(ABC):
    """How one model wants its conversations."""

    @abstractmethod
    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of a conversation, up to where the model's answer begins, or is to be continued.

        Raises ChatFormatError.
        """


def mistral_version(tokenizer: Tokenizer) -> Version | None:
    """Which of Mistral's instruct formats a tokenizer could be made for; None if it is none of these.

    v1 (models v0.1 and v0.2) writes [INST] as text, v2 and v3 have control tokens for it; from v7 on there is one for
    the system prompt, too. No weights were released for v2: only a file named tokenizer.model.v2 is taken for it.
    """
    names = tokenizer.control_ids()
    if not {"<s>", "</s>"} <= names.keys() or "[SYSTEM_PROMPT]" in names:
        return None
    if {"[INST]", "[/INST]"} <= names.keys():
        return "v2" if str(getattr(tokenizer, "path", "")).endswith(".v2") else "v3"
    return "v1" if tokenizer.vocab_size >= 32000 and tokenizer.encode("[INST]") == [733, 16289, 28793] else None


class MistralFormat(ChatFormat):
    """Mistral's instruct formats; ids equal those of mistral-common."""

    def __init__(self, tokenizer: Tokenizer, version: Version) -> None:
        self.version = version
        self._tokenizer = tokenizer
        self._bos, self._eos = self._control("<s>"), self._control("</s>")

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        check_messages(messages)
        if self.version == "v1" and (tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)):
            raise ChatFormatError("tools need Mistral's v3 format (Mistral-7B-Instruct-v0.3)")
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system" and m["content"])
        turns = _merge_turns(messages)
        _check_turns(turns)
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
            return [*self._block("[TOOL_CALLS]", self._calls_json(turn["tool_calls"])), self._eos]
        if turn.get("ids"):
            return [*turn["ids"], self._eos]
        text = turn["content"] if self.version == "v1" else turn["content"].rstrip(" ")
        return [*self._tokenizer.encode(text), self._eos]

    def _tool_result(self, turn: Message, in_past: bool) -> list[int]:
        content = _parsed(turn["content"] or "{}")
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
            entry = {"name": function["name"], "arguments": _parsed(arguments)}
            if self.version == "v3" and call.get("id") not in (None, "", "null"):
                entry["id"] = call["id"]
            written.append(entry)
        return _json(written)

    def _block(self, begin: str, text: str, end: str | None = None) -> list[int]:
        """Control tokens are put in by id; the text between them stays text."""
        first, last = self._control(begin), [self._control(end)] if end else []
        return [first, *self._tokenizer.encode(text), *last]

    def _control(self, name: str) -> int:
        token = self._tokenizer.control_id(name)
        if token is None:
            raise ChatFormatError(f"the tokenizer has no {name} token")
        return token


class TemplateFormat(ChatFormat):
    """A model's own chat templates (Jinja), rendered in a sandbox, with text kept apart from control tokens."""

    def __init__(self, tokenizer: Tokenizer, templates: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """`templates` by their names: "default", and "tool_use" for conversations with tools."""
        self._tokenizer = tokenizer
        self._templates = templates
        self._settings = settings

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        from m7mlx.tokens.template import Guard, render

        check_messages(messages)
        template = self._template(bool(tools))
        # An answer whose ids are known goes through the template as a name that nothing else contains.
        nonce = secrets.token_hex(8)
        kept = {
            f"\ufdd0{nonce}:{n}\ufdd1": list(m["ids"])
            for n, m in enumerate(messages)
            if m["role"] == "assistant" and m.get("ids") and not m.get("tool_calls")
        }
        end = f"\ufdd0{nonce}:end\ufdd1"  # of a message that is continued: a name, too
        controls = self._tokenizer.control_ids()
        guard = Guard([*controls, *kept, end])
        bare = [_with_objects({k: v for k, v in m.items() if k not in ("ids", "prefix")}) for m in messages]
        *plain, given = guard.protect([*bare, {"tools": list(tools)}])
        for name in kept:
            plain[int(name.rpartition(":")[2][:-1])]["content"] = name
        continued = plain[-1]["content"] if is_continued(messages) else None
        if continued is not None:
            plain[-1]["content"] = f"{continued}{end} "
        context = {
            "messages": plain,
            "tools": given["tools"] or None,
            "add_generation_prompt": continued is None,
            **{k: _token_name(self._settings.get(k)) for k in ("bos_token", "eos_token", "unk_token", "pad_token")},
        }
        rendered = render(template, context)
        if continued is not None:
            rendered = _cut(rendered, continued, end)
        parts: list[str | int] = []
        for part in guard.split(rendered):
            if part.name in kept:
                parts += kept[part.name]
            else:
                parts.append(controls[part.name] if part.is_control else part.name)
        return self._tokenizer.encode_mixed(parts)

    def _template(self, has_tools: bool) -> str:
        if not self._templates:
            raise ChatFormatError("the model has no chat template: it completes text; give the prompt as a string")
        for name in ("tool_use", "default") if has_tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        names = ", ".join(map(repr, self._templates))
        raise ChatFormatError(f"none of the model's chat templates is the default one; they are {names[:200]}")


def _cut(rendered: str, message: str, end: str) -> str:
    """Cut a rendered conversation where its last message ends, of which `end` and a space were made a part.

    Where the template strips that space, it strips messages: this one loses what white space it ends in, too, as in
    transformers. Raises ChatFormatError where the message does not stand there as it is.
    """
    place = rendered.rfind(end)
    before = rendered[: max(place, 0)]
    if place < 0 or not before.rstrip().endswith(message.strip()):
        raise ChatFormatError(
            "the model's chat template does not keep the last message as it is, so it cannot be continued"
        )
    return before if rendered.startswith(" ", place + len(end)) else before.rstrip()


def is_continued(messages: Sequence[Message]) -> bool:
    """Whether the model continues the last message, instead of answering it."""
    return bool(messages[-1].get("prefix"))


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ChatFormatError unless these are messages with known roles and text."""
    if not messages:
        raise ChatFormatError("a conversation needs at least one message")
    for n, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ChatFormatError(f"message {n} has no role out of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ChatFormatError(f"message {n} ({message['role']}) has no text as its content")
        if message.get("prefix") is not None:
            _check_prefix(message, f"message {n} ({message['role']})", is_last=n == len(messages))


def _check_prefix(message: Message, name: str, *, is_last: bool) -> None:
    if not isinstance(message["prefix"], bool):
        raise ChatFormatError(f"{name}: prefix must be true or false")
    if not message["prefix"]:
        return
    if not is_last or message["role"] != "assistant":
        raise ChatFormatError(f"{name} cannot have a prefix of true: only an assistant's last message is continued")
    if message.get("tool_calls"):
        raise ChatFormatError(f"{name} calls tools, so it cannot be continued; leave out prefix")
    if not (message["content"] or message.get("ids")):
        raise ChatFormatError(f"{name} is empty, so it cannot be continued; leave it out")


def _merge_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Neighbours of one role become one turn, joined by a blank line; tool results stay apart."""
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


def _check_turns(turns: Sequence[Message]) -> None:
    for turn in turns:
        if turn["role"] != "assistant":
            continue
        if turn.get("tool_calls") and turn["content"]:
            raise ChatFormatError("an assistant message holds either text or tool calls, not both")
        if not (turn.get("tool_calls") or turn["content"] or turn.get("ids")):
            raise ChatFormatError("an assistant message is empty; leave it out")


def _tools_json(tools: Sequence[Mapping[str, Any]]) -> str:
    """OpenAI-style tools in the key order of mistral-common's models."""
    written = []
    for tool in tools:
        function = tool["function"]
        entry = {k: function.get(k, "") for k in ("name", "description")}
        written.append({"type": "function", "function": entry | {"parameters": function["parameters"]}})
    return _json(written)


def nests_deeper(value: Any, levels: int) -> bool:
    """Whether lists and mappings nest deeper than so many levels; a level at a time, not going down into it."""
    level = [value] if isinstance(value, _NESTED) else []
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, _NESTED)
        ]
    return bool(level)


def _parsed(value: Any) -> Any:
    """JSON in a text → its value; other texts stay what they are. Raises ChatFormatError where it nests too deep."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if not nests_deeper(value, MAX_DEPTH):
            return value
    except ValueError:
        return value
    except RecursionError:
        pass
    raise ChatFormatError(f"a tool's arguments or its answer nest deeper than {MAX_DEPTH} levels")


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Templates want a call's arguments as an object; OpenAI's API has them as JSON in a text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    written = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(arguments := _parsed(function.get("arguments")), dict):
            call = {**call, "function": {**function, "arguments": arguments}}
        written.append(call)
    return message | {"tool_calls": written}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _token_name(value: Any) -> str:
    return value["content"] if isinstance(value, Mapping) else value or ""
