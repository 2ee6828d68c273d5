"""One of several answers as its client reads it: text, tool calls and log probabilities.

What a stream tells is not kept. What a whole answer tells at its end is kept as JSON: as objects, a
long answer would take ten times the memory, and writing all at once would hold up everybody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m7mlx import Piece, TokenLogprobs
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.openai.shape import Fields, Shape
from m7mlx_serve.tool_calls import CallReader, NamedCallReader

_AT_ONCE = 16  # tokens whose log probabilities are sent in one piece


class Choice:
    """Takes the pieces of one answer and makes chunks of them, or one whole choice at the end.

    mark      the id after which tool calls are written; None where none may be
    calling   whether the answer begins with tool calls
    streamed  whether the client reads chunks
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        shape: Shape,
        mark: int | None,
        calling: bool,
        streamed: bool,
    ) -> None:
        self.index, self._tokenizer, self._shape, self._streamed = index, tokenizer, shape, streamed
        self._mark, self._calling = mark, calling
        self._reader = NamedCallReader() if tokenizer.names_calls else CallReader()
        self._lead_told = False  # the text before the calls
        self._characters = 0  # of text told so far
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._logprobs = LogprobsJson(shape)
        self.reason: str | None = None

    def feed(self, piece: Piece) -> list[Fields]:
        """Take a piece; return the choices of the chunks that it makes, none without a stream."""
        scored = [_scored(self._tokenizer, one) for one in piece.logprobs]
        offset = self._characters
        text, calls = self._parted(piece)
        self._characters += len(text)
        if piece.finish_reason is not None:
            called = piece.finish_reason == "stop" and self._reader.has_calls and not self._reader.is_open
            self.reason = "tool_calls" if called else piece.finish_reason
        if not self._streamed:
            self._texts.append(text)
            self._thoughts.append(piece.thought)
            self._logprobs.add(scored, offset)
            return []
        chunks = []
        if text or piece.thought or scored:
            chunks.append(self._chunk(self._shape.delta(text, piece.thought), scored, offset))
        chunks += [self._chunk(self._shape.delta(call=call)) for call in calls]
        if piece.finish_reason is not None:
            chunks.append(self._chunk(self._shape.delta(), reason=self.reason))
        return chunks

    def _parted(self, piece: Piece) -> tuple[str, list[Fields]]:
        """The text of a piece that is shown, and the deltas of calls in it.

        A control token stands behind the text of its piece.
        """
        text, calls = piece.text, list[Fields]()
        if self._calling:
            calls, text = list(self._reader.add(text)), ""
        for token in piece.ids:
            name = self._tokenizer.marks.get(token)
            if self._calling and name is not None:
                calls += self._reader.mark(name)
            elif token == self._mark:
                self._calling = True
        if calls and not self._lead_told:
            self._lead_told, text = True, text + self._reader.lead
        if self._calling and piece.finish_reason is not None and not self._reader.has_calls:
            text += self._reader.rest
        return text, calls

    def opening(self) -> Fields | None:
        """The choice of a stream's first chunk; None where a stream begins with text."""
        content = self._shape.opening()
        return None if content is None else self._chunk(content)

    def whole(self) -> Fields:
        """The whole choice, for `write`."""
        content = self._shape.whole("".join(self._texts), self._reader.calls, "".join(self._thoughts))
        return {"index": self.index, **content, "finish_reason": self.reason, "logprobs": self._logprobs}

    def _chunk(
        self,
        content: Fields,
        scored: Sequence[Fields] = (),
        offset: int = 0,
        reason: str | None = None,
    ) -> Fields:
        shape = self._shape
        logprobs = {**shape.logprobs(scored, offset), **shape.logprobs_end} if scored else None
        return {"index": self.index, **content, "logprobs": logprobs, "finish_reason": reason}


class LogprobsJson:
    """The field `logprobs` of a whole answer, in JSON."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._items: dict[str, list[str]] = {}  # of each list, in JSON

    def add(self, scored: Sequence[Fields], offset: int) -> None:
        """Add tokens that stand after `offset` characters."""
        for field, values in self._shape.logprobs(scored, offset).items() if scored else ():
            self._items.setdefault(field, []).extend(map(_json, values))

    def write(self) -> Iterator[str]:
        """Yield all of the field in pieces; "null" if nothing was added."""
        if not self._items:
            yield "null"
            return
        for n, (field, items) in enumerate(self._items.items()):
            yield f'{", " if n else "{"}"{field}": ['
            for start in range(0, len(items), _AT_ONCE):
                yield (", " if start else "") + ", ".join(items[start : start + _AT_ONCE])
            yield "]"
        yield "".join(f', "{field}": {_json(value)}' for field, value in self._shape.logprobs_end.items()) + "}"


def write(answer: Mapping[str, Any]) -> Iterator[str]:
    """The JSON of an object with whole choices, in pieces none of which takes long to write."""
    yield _json({field: value for field, value in answer.items() if field != "choices"})[:-1] + ', "choices": ['
    for n, choice in enumerate(answer["choices"]):
        told = {field: value for field, value in choice.items() if field != "logprobs"}
        yield f'{", " if n else ""}{_json(told)[:-1]}, "logprobs": '
        yield from choice["logprobs"].write()
        yield "}"
    yield "]}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _scored(tokenizer: Tokenizer, one: TokenLogprobs) -> Fields:
    """A token with its log probability and those of the likeliest in its place."""
    top = [_token(tokenizer, other, logprob) for other, logprob in one.top]
    return _token(tokenizer, one.id, one.logprob) | {"top_logprobs": top}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> Fields:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}
