"""One of several answers as its client reads it: text, tool calls and log probabilities.

What a stream tells is not kept. What a whole answer tells at its end is kept as JSON: as objects, a
long answer would take ten times the memory, and writing all at once would hold up everybody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m7mlx import Piece, TokenLogprobs
from m7mlx.answer_reader import AnswerReader
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.openai.shape import Fields, Scored, Shape

_AT_ONCE = 16  # tokens whose log probabilities are sent in one piece


class Choice:
    """Takes the pieces of one answer and makes chunks of them, or one whole choice at the end.

    reader    reads the pieces
    streamed  whether the client reads chunks
    echoed    the ids of the prompt, if they are told before the answer; with log probabilities
              (`is_scored`) as these come
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        shape: Shape,
        reader: AnswerReader,
        streamed: bool,
        echoed: Sequence[int] = (),
        is_scored: bool = False,
    ) -> None:
        self.index, self._tokenizer, self._shape, self._streamed = index, tokenizer, shape, streamed
        self._reader, self._echoed, self._is_scored = reader, echoed, is_scored
        self._echo, self._echo_begun = tokenizer.detokenizer(), False
        self._characters = 0  # of text told so far
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._logprobs = LogprobsJson(shape)
        self.reason: str | None = None

    def feed(self, piece: Piece) -> list[Fields]:
        """Take a piece; return the choices of the chunks that it makes, none without a stream."""
        before, scored = self._read_prompt(piece) if self._echoed else ("", [])
        scored += [(_scored(self._tokenizer, one), self._characters) for one in piece.logprobs]
        text, calls, thought = self._reader.read(piece)
        self._characters += len(text)
        text = before + text
        if piece.finish_reason is not None:
            self.reason = self._reader.reason
        if not self._streamed:
            self._texts.append(text)
            self._thoughts.append(thought)
            self._logprobs.add(scored)
            return []
        chunks = []
        if text or thought or scored:
            chunks.append(self._chunk(self._shape.delta(text, thought), scored))
        chunks += [self._chunk(self._shape.delta(call=call)) for call in calls]
        if piece.finish_reason is not None:
            chunks.append(self._chunk(self._shape.delta(), reason=self.reason))
        return chunks

    def opening(self) -> Fields | None:
        """The choice of a stream's first chunk; None where a stream begins with text."""
        content = self._shape.opening()
        return None if content is None else self._chunk(content)

    def whole(self) -> Fields:
        """The whole choice, for `write`."""
        content = self._shape.whole("".join(self._texts), self._reader.calls, "".join(self._thoughts))
        return {"index": self.index, **content, "finish_reason": self.reason, "logprobs": self._logprobs}

    def _read_prompt(self, piece: Piece) -> tuple[str, list[Scored]]:
        """The text of the prompt that is told with a piece, and how likely its tokens were.

        A piece of an answer is told behind all of its prompt.
        """
        count = len(piece.prompt) + (not self._echo_begun) if piece.prompt else len(self._echoed)
        ids, self._echoed, self._echo_begun = self._echoed[:count], self._echoed[count:], True
        scores = [*[None] * (count - len(piece.prompt)), *piece.prompt]
        text, scored = "", list[Scored]()
        for token, score in zip(ids, scores, strict=True):
            if self._is_scored:
                told = _unscored(self._tokenizer, token) if score is None else _scored(self._tokenizer, score)
                scored.append((told, self._characters + len(text)))
            text += self._echo.add(token)
        if not self._echoed:
            text += self._echo.finish()
        self._characters += len(text)
        return text, scored

    def _chunk(
        self,
        content: Fields,
        scored: Sequence[Scored] = (),
        reason: str | None = None,
    ) -> Fields:
        shape = self._shape
        logprobs = {**shape.logprobs(scored), **shape.logprobs_end} if scored else None
        return {"index": self.index, **content, "logprobs": logprobs, "finish_reason": reason}


class LogprobsJson:
    """The field `logprobs` of a whole answer, in JSON."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._items: dict[str, list[str]] = {}  # of each list, in JSON

    def add(self, scored: Sequence[Scored]) -> None:
        """Add tokens."""
        for field, values in self._shape.logprobs(scored).items() if scored else ():
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


def _unscored(tokenizer: Tokenizer, token: int) -> Fields:
    """The first token of a prompt, which nothing stands before."""
    return _token(tokenizer, token, 0.0) | {"logprob": None, "top_logprobs": []}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> Fields:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}
