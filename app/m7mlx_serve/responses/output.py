"""Pieces of an answer → the items of a response, and the events that tell how they come."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from m7mlx import Piece
from m7mlx.answer_reader import AnswerReader, Told, read_arguments
from m7mlx_serve.responses.items import custom_input, sealed
from m7mlx_serve.responses.tools import Called

_Fields = dict[str, Any]
_TEXT, _THOUGHT, _CALL, _CUSTOM = "message", "reasoning", "function_call", "custom_tool_call"


class Output:
    """Takes the pieces of one answer.

    items     what has come so far, as clients read it
    messages  the same as messages (`m7mlx.tokens.messages`), once all of it has come
    """

    def __init__(self, reader: AnswerReader, called: Mapping[str, Called], seals_thoughts: bool) -> None:
        self._reader, self._called, self._seals = reader, called, seals_thoughts
        self.items: list[_Fields] = []
        self._kind = ""  # of the item that is open, which is the last
        self._pieces: list[str] = []  # of its text
        self._said, self._thought = list[str](), list[str]()
        self.generated = self.thought_tokens = 0

    @property
    def is_cut(self) -> bool:
        """Whether the answer has as many tokens as it may, and is not whole."""
        return self._reader.reason == "length"

    @property
    def messages(self) -> list[_Fields]:
        message: _Fields = {"role": "assistant", "content": "".join(self._said)}
        if self._thought:
            message["reasoning_content"] = "".join(self._thought)
        if calls := self._reader.calls:
            message["tool_calls"] = calls
        return [message]

    def take(self, piece: Piece) -> Iterator[_Fields]:
        """The events of one more piece, without their numbers."""
        told = self._reader.read(piece)
        self.generated += len(piece.ids)
        self.thought_tokens += len(piece.ids) if told.thought else 0
        yield from self._told(told)
        if piece.finish_reason is not None:
            if not any(item["type"] != _THOUGHT for item in self.items):
                yield from self._begin(_TEXT, {"role": "assistant", "content": []})  # an answer says something
            yield from self._end("incomplete" if self.is_cut else "completed")

    def _told(self, told: Told) -> Iterator[_Fields]:
        for kind, text, kept in ((_THOUGHT, told.thought, self._thought), (_TEXT, told.text, self._said)):
            if text:
                if self._kind != kind:
                    more: _Fields = {"summary": []} if kind == _THOUGHT else {"role": "assistant"}
                    yield from self._begin(kind, more | {"content": []})
                kept.append(text)
                self._pieces.append(text)
                name = "reasoning_text" if kind == _THOUGHT else "output_text"
                logprobs: _Fields = {} if kind == _THOUGHT else {"logprobs": []}
                yield self._event(f"{name}.delta", content_index=0, delta=text, **logprobs)
        for call in told.calls:
            function = call["function"]
            if "id" in call:
                called = self._called.get(function["name"], Called("", function["name"], is_custom=False))
                head = {"call_id": call["id"], "name": called.name}
                head |= {"namespace": called.namespace} if called.namespace else {}
                kind, given = (_CUSTOM, "input") if called.is_custom else (_CALL, "arguments")
                yield from self._begin(kind, head | {given: ""})
            if arguments := function["arguments"]:
                self._pieces.append(arguments)
                if self._kind == _CALL:
                    yield self._event("function_call_arguments.delta", delta=arguments)

    def _begin(self, kind: str, fields: _Fields) -> Iterator[_Fields]:
        yield from self._end("completed")
        prefix = {_TEXT: "msg", _THOUGHT: "rs", _CALL: "fc", _CUSTOM: "ctc"}[kind]
        status = {} if kind == _CUSTOM else {"status": "in_progress"}
        self.items.append({"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, **status, **fields})
        self._kind, self._pieces = kind, []
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": self.items[-1]}
        if kind in (_TEXT, _THOUGHT):
            yield self._event("content_part.added", content_index=0, part=self._part(""))

    def _end(self, status: str) -> Iterator[_Fields]:
        """Close the item that is open. What has been told of it stays as it was told."""
        if not self._kind:
            return
        text = "".join(self._pieces)
        item = {**self.items[-1]} | ({} if self._kind == _CUSTOM else {"status": status})
        if self._kind in (_TEXT, _THOUGHT):
            part = self._part(text)
            name = "output_text.done" if self._kind == _TEXT else "reasoning_text.done"
            logprobs: _Fields = {"logprobs": []} if self._kind == _TEXT else {}
            yield self._event(name, content_index=0, text=text, **logprobs)
            yield self._event("content_part.done", content_index=0, part=part)
            item["content"] = [part]
            if self._kind == _THOUGHT and self._seals:
                item["encrypted_content"] = sealed(text)
        elif self._kind == _CALL:
            yield self._event("function_call_arguments.done", arguments=text)
            item["arguments"] = text
        else:
            item["input"] = custom_input(read_arguments(text))
            if item["input"]:
                yield self._event("custom_tool_call_input.delta", delta=item["input"])
            yield self._event("custom_tool_call_input.done", input=item["input"])
        self.items[-1], self._kind = item, ""
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _part(self, text: str) -> _Fields:
        if self._kind == _THOUGHT:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _event(self, name: str, **fields: Any) -> _Fields:
        """An event about the item that is open."""
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{name}", **place, **fields}
