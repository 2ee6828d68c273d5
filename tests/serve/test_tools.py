"""Tool calls as they are written: however the text is cut, clients put the same calls together."""

from __future__ import annotations

import itertools
import json
import re
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from m7mlx_serve.openai.chat import ChatShape
from m7mlx_serve.openai.choices import Choice, write
from m7mlx_serve.openai.text import TextShape

from m7mlx import Piece, TokenLogprobs
from m7mlx.answer_reader import AnswerReader
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tools.calls import MARK, CallReader

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CALL = st.fixed_dictionaries(
    {"name": st.text(min_size=1), "arguments": st.dictionaries(st.text(max_size=5), JSON, max_size=4)},
    optional={"id": st.text(), "nothing": JSON},
)
CUTS = st.lists(st.integers(0, 400), max_size=12)


def joined(text: str, cuts: list[int]) -> tuple[list[dict[str, Any]], CallReader]:
    """What a client makes of the deltas."""
    calls: list[dict[str, Any]] = []
    reader = CallReader()
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        for delta in reader.add(text[start:end]):
            if "id" in delta:
                assert delta["index"] == len(calls)
                assert re.fullmatch("[A-Za-z0-9]{9}", delta["id"])
                assert delta["function"]["name"] and not delta["function"]["arguments"]
                calls.append({"id": delta["id"], "type": delta["type"], "function": dict(delta["function"])})
            else:
                assert set(delta["function"]) == {"arguments"} and delta["function"]["arguments"]
                calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    assert calls == reader.calls
    return calls, reader


def plain(calls: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@given(
    calls=st.lists(CALL, min_size=1, max_size=4), cuts=CUTS, indent=st.sampled_from([None, 2]), ascii=st.booleans()
)
def test_calls_are_what_was_written(
    calls: list[dict[str, Any]], cuts: list[int], indent: int | None, ascii: bool
) -> None:
    found, reader = joined(json.dumps(calls, indent=indent, ensure_ascii=ascii), cuts)
    assert [name for name, _ in plain(found)] == [call["name"] for call in calls]
    for (_, arguments), call in zip(plain(found), calls, strict=True):
        assert json.loads(arguments) == call["arguments"]
    assert not reader.is_open and not reader.rest and len({call["id"] for call in found}) == len(calls)


@given(text=st.text(alphabet='[{"name,:}]\\ arguments1\n', max_size=60), cuts=CUTS)
def test_any_text_cut_in_any_way_is_read_alike(text: str, cuts: list[int]) -> None:
    for prefix in ("", '[{"name": "a", "arguments": {"x": ', '[{"arguments": '):
        whole, _ = joined(prefix + text, [])
        cut, reader = joined(prefix + text, cuts)
        assert plain(whole) == plain(cut)
        assert reader.calls or reader.rest == prefix + text  # nothing is lost


@pytest.mark.parametrize(
    ("text", "calls", "is_open"),
    [
        ('[{"arguments": {"x": 1}, "name": "late"}]', [("late", '{"x": 1}')], False),
        ('[{"name": "none"}]', [("none", "{}")], False),
        ('[{"name": "empty", "arguments":}]', [("empty", "{}")], False),
        ('[{"name": "word", "arguments": null }]', [("word", "null")], False),
        ('[{"name": "cut", "arguments": {"x": "}', [("cut", '{"x": "}')], True),
        ('[{"name": "a", "arguments": {}, "arguments": {"x": 1}}]', [("a", "{}")], False),
        ('[{"name": "a", "arguments": {}} {"name": "b", "arguments": {"}": "]"}}', [("a", "{}"), ("b", '{"}": "]"}')], False),  # noqa: E501
        ('[{"name": 7, "arguments": {}}]', [], False),
        ('[{"name": "\\ud800", "arguments": {}}]', [("?", "{}")], False),
        ("[{name: a}]", [], False),
        ("I would rather not", [], False),
    ],
)  # fmt: skip
def test_what_models_write_besides(text: str, calls: list[tuple[str, str]], is_open: bool) -> None:
    found, reader = joined(text, list(range(len(text))))
    assert (plain(found), reader.is_open) == (calls, is_open)


def choice(tokenizer: Tokenizer, pieces: list[str | int], reason: Any) -> tuple[list[Any], Any]:
    """The chunks and the whole of an answer; numbers are ids."""
    both = [
        Choice(0, tokenizer, ChatShape(), AnswerReader(tokenizer, "allowed"), streamed) for streamed in (True, False)
    ]
    chunks = []
    for piece in pieces:
        told_piece = Piece(piece, [9]) if isinstance(piece, str) else Piece(ids=[piece])
        chunks += [chunk for told in both for chunk in told.feed(told_piece)]
    return chunks + [c for told in both for c in told.feed(Piece(finish_reason=reason))], both[1].whole()


@pytest.mark.parametrize("is_chat", [True, False])
def test_scores_are_kept_for_whole_answers_only(mistral_tokenizers: dict[str, Tokenizer], is_chat: bool) -> None:
    """A stream keeps only what it has not told; a whole answer is written in pieces."""
    tokenizer = mistral_tokenizers["v3"]
    piece = Piece("é", [900], logprobs=[TokenLogprobs(900, -0.5, [(900, -0.5), (901, -2.0)])])
    sizes = {}
    for streamed in (True, False):
        shape = ChatShape() if is_chat else TextShape()
        told = Choice(0, tokenizer, shape, AnswerReader(tokenizer, "none"), streamed)
        told.feed(piece)
        tracemalloc.start()
        for _ in range(3000):
            told.feed(piece)
        sizes[streamed] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert sizes[True] < 20_000 < 3000 * 100 < sizes[False]
    told.feed(Piece(finish_reason="stop"))
    pieces = list(write({"id": "x", "choices": [told.whole(), told.whole()]}))
    assert max(map(len, pieces)) < 10_000
    found = json.loads("".join(pieces))
    assert found["choices"][0] == found["choices"][1]
    scores = found["choices"][0]["logprobs"]
    if is_chat:
        assert len(scores["content"]) == 3001 and scores["refusal"] is None
        assert [top["logprob"] for top in scores["content"][-1]["top_logprobs"]] == [-0.5, -2.0]
    else:
        assert scores["text_offset"] == list(range(3001)) and scores["token_logprobs"] == [-0.5] * 3001
        assert len(scores["tokens"]) == len(scores["top_logprobs"]) == 3001


def test_text_before_the_mark_is_content(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = mistral_tokenizers["v3"]
    mark = tokenizer.control_id(MARK)
    assert mark is not None
    call = ['[{"na', 'me": "f", "argu', 'ments": {"x"', ": 1}}]"]
    chunks, whole = choice(tokenizer, ["Let me ", mark, "see: ", *call], "stop")  # held back, told behind the mark
    assert whole["message"]["content"] == "Let me see: "
    assert plain(whole["message"]["tool_calls"]) == [("f", '{"x": 1}')]
    assert whole["finish_reason"] == chunks[-1]["finish_reason"] == "tool_calls"
    deltas = [part for chunk in chunks for part in chunk["delta"].get("tool_calls", [])]
    assert [part["function"] for part in deltas] == [
        {"name": "f", "arguments": ""}, {"arguments": '{"x"'}, {"arguments": ": 1}"}
    ]  # fmt: skip
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "Let me see: "
    assert choice(tokenizer, [mark, *call[:3]], "length")[1]["finish_reason"] == "length"
    assert (
        choice(tokenizer, [mark, *call[:3]], "stop")[1]["finish_reason"] == "stop"
    )  # and a client sees that it is cut
    _, spelled = choice(tokenizer, [MARK, *call], "stop")  # letters are no mark
    assert spelled["message"]["content"] == MARK + "".join(call) and "tool_calls" not in spelled["message"]
    _, refused = choice(tokenizer, [mark, " No, ", "sorry"], "stop")
    assert refused["message"] == {"role": "assistant", "content": " No, sorry", "refusal": None}
