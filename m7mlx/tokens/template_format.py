"""A model's own chat template: messages → ids."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from m7mlx.errors import ChatFormatError
from m7mlx.terminal import shown
from m7mlx.tokens.messages import ChatFormat, Message, check_messages, is_continued, parse_json
from m7mlx.tokens.template import Marker, render
from m7mlx.tokens.tokenizer import Tokenizer


class TemplateFormat(ChatFormat):
    """A model's chat templates (Jinja), rendered in a sandbox; text stays text in them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: Mapping[str, str],
        settings: Mapping[str, Any],
    ) -> None:
        """Take the templates by name: "default", and "tool_use" for conversations with tools."""
        self._tokenizer = tokenizer
        self._templates = templates
        self._settings = settings

    def __repr__(self) -> str:
        return f"TemplateFormat({', '.join(map(shown, self._templates))})"

    def mentions(self, word: str) -> bool:
        """Whether the template for conversations with tools has this word in its source."""
        template = self._templates.get("tool_use") or self._templates.get("default") or ""
        return word in template

    @property
    def takes_effort(self) -> bool:
        return "reasoning_effort" in (self._templates.get("default") or "")

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        effort: str | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> list[int]:
        check_messages(messages)
        template = self._template(bool(tools))
        if effort is not None and "reasoning_effort" not in template:
            raise ChatFormatError("this model cannot be told how much to think; leave out reasoning_effort")
        # An answer whose ids are known goes through the template as a name that no text contains.
        # So does the place where a message ends that is to be continued.
        nonce = secrets.token_hex(8)
        kept = {
            f"\ufdd0{nonce}:{n}\ufdd1": list(m["ids"])
            for n, m in enumerate(messages)
            if m["role"] == "assistant" and m.get("ids") and not m.get("tool_calls")
        }
        end = f"\ufdd0{nonce}:end\ufdd1"
        controls = self._tokenizer.control_ids()
        marker = Marker([*controls, *kept, end])
        bare = [_with_objects({k: v for k, v in m.items() if k not in ("ids", "prefix")}) for m in messages]
        *plain, given = marker.mark([*bare, {"tools": list(tools), "effort": effort}])
        for name in kept:
            plain[int(name.rpartition(":")[2][:-1])]["content"] = name
        continued = plain[-1].get("content") if is_continued(messages) else None
        if is_continued(messages) and not isinstance(continued, str):
            raise ChatFormatError("the model's chat template continues a text only, not parts or thoughts")
        if continued is not None:
            plain[-1]["content"] = f"{continued}{end} "
        context = {
            "messages": plain,
            "tools": given["tools"] or None,
            "add_generation_prompt": continued is None,
            **({} if effort is None else {"reasoning_effort": given["effort"]}),
            **{k: _token_name(self._settings.get(k)) for k in ("bos_token", "eos_token", "unk_token", "pad_token")},
        }
        rendered = render(template, context)
        if continued is not None:
            rendered = _cut(rendered, continued, end)
        parts: list[str | int] = []
        for part in marker.split(rendered):
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
    """Cut a rendered conversation at `end`, which was put behind its last message with a space.

    A template that has dropped this space strips messages, so the white space at the end of this
    one goes as well, as in transformers. Raises ChatFormatError where the template has changed or
    left out the message.
    """
    place = rendered.rfind(end)
    before = rendered[: max(place, 0)]
    if place < 0 or not before.rstrip().endswith(message.strip()):
        raise ChatFormatError(
            "the model's chat template does not keep the last message as it is, so it cannot be continued"
        )
    return before if rendered.startswith(" ", place + len(end)) else before.rstrip()


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Turn calls' arguments into objects for templates; OpenAI's API has them as JSON texts."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    written = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(arguments := parse_json(function.get("arguments")), dict):
            call = {**call, "function": {**function, "arguments": arguments}}
        written.append(call)
    return message | {"tool_calls": written}


def _token_name(value: Any) -> str:
    return value["content"] if isinstance(value, Mapping) else value or ""
