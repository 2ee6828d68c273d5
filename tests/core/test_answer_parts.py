"""Answers with thoughts and calls in them: what is part of the answer, by control ids alone."""

from __future__ import annotations

import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from models import small_config, small_model
from tekken_files import SIZE, write_tekken

from m7mlx import Piece, Request, stream_generate
from m7mlx.answer import Answer
from m7mlx.model import Mistral
from m7mlx.scheduler import Scheduler
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer

NAMES = ["[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mistral, Tokenizer]:
    """A small model with the vocabulary of v13."""
    folder = write_tekken(tmp_path_factory.mktemp("v13"), "v13")
    return small_model(small_config(vocab_size=SIZE, n_layers=1)), load_tokenizer(folder)


def ids_of(tokenizer: Tokenizer, parts: list[str]) -> list[int]:
    """The ids of texts and, for the names of control tokens in a list by themselves, of those."""
    ids: list[int] = []
    for part in parts:
        token = tokenizer.control_id(part) if part in NAMES else None  # others are text, “<s>” too
        ids += tokenizer.encode(part) if token is None else [token]
    return ids


def pieces_of(
    thinker: tuple[Mistral, Tokenizer], parts: list[str], request: Request | None = None, ends: bool = True
) -> list[Piece]:
    model, tokenizer = thinker
    request = request or Request([1], max_tokens=None)
    answer = Answer(request, model, tokenizer)
    ids = ids_of(tokenizer, parts) + [2] * ends
    pieces: list[Piece] = []
    for token in ids:
        pieces.append(answer.take(token))
        if pieces[-1].finish_reason is not None:
            return pieces
    return [*pieces, answer.end("length")]


def told(pieces: list[Piece]) -> tuple[str, str]:
    return "".join(piece.thought for piece in pieces), "".join(piece.text for piece in pieces)


def test_thoughts_are_no_part_of_the_answer(thinker: tuple[Mistral, Tokenizer]) -> None:
    pieces = pieces_of(thinker, ["[THINK]", "Hm, 2 × 21 …", "[/THINK]", "42 😀"])
    assert told(pieces) == ("Hm, 2 × 21 …", "42 😀")
    assert pieces[-1].finish_reason == "stop" and pieces[-1].stats is not None
    assert told(pieces_of(thinker, ["[THINK] x [/THINK] y"])) == ("", "[THINK] x [/THINK] y")
    assert told(pieces_of(thinker, ["a", "[THINK]", "b", "[/THINK]", "c", "[THINK]", "d"])) == ("bd", "ac")
    assert told(pieces_of(thinker, ["[/THINK]", "a"])) == ("", "a")


@given(st.lists(st.one_of(st.sampled_from(NAMES), st.text(st.characters(codec="utf-8"), max_size=5)), max_size=10))
@settings(max_examples=examples(60), deadline=None)
def test_any_order_of_parts(thinker: tuple[Mistral, Tokenizer], parts: list[str]) -> None:
    thought, text, thinks = "", "", False
    for part in parts:
        if part in NAMES:
            thinks = part == "[THINK]" or (thinks and part != "[/THINK]")
        elif thinks:
            thought += part
        else:
            text += part
    pieces = pieces_of(thinker, parts)
    assert told(pieces) == (thought, text)
    marks = set(thinker[1].marks)
    for piece in pieces:
        assert not marks & set(piece.ids[:-1])


def test_a_piece_ends_with_a_token_that_parts_the_answer(thinker: tuple[Mistral, Tokenizer]) -> None:
    """An unfinished character, or what may become a stop text, stands before it."""
    model, tokenizer = thinker
    euro = [100 + byte for byte in "€".encode()]
    answer = Answer(Request([1], max_tokens=None, stop=["END"]), model, tokenizer)
    mark = tokenizer.control_id("[TOOL_CALLS]")
    assert mark is not None
    assert "".join(answer.take(token).text for token in [*tokenizer.encode("aEN"), *euro[:2]]) == "a"
    assert answer.take(mark).text == "EN\ufffd\ufffd"
    assert "".join(answer.take(token).text for token in tokenizer.encode("D x")) == "D x"


def test_stop_texts_are_looked_for_in_the_answer_alone(thinker: tuple[Mistral, Tokenizer]) -> None:
    request = Request([1], max_tokens=None, stop=["END"])
    pieces = pieces_of(thinker, ["[THINK]", "not the END", "[/THINK]", "here END there"], request)
    assert told(pieces) == ("not the END", "here ") and pieces[-1].finish_reason == "stop"


def test_an_answer_that_is_broken_off_in_its_thoughts(thinker: tuple[Mistral, Tokenizer]) -> None:
    _, tokenizer = thinker
    assert told(pieces_of(thinker, ["[THINK]", "so fa"], ends=False)) == ("so fa", "")
    begun = ids_of(tokenizer, ["[THINK]", "so "])
    request = Request([1], max_tokens=None, continues=begun)
    assert told(pieces_of(thinker, ["far", "[/THINK]", "so good"], request)) == ("far", "so good")


def test_the_same_alone_and_in_a_batch(thinker: tuple[Mistral, Tokenizer]) -> None:
    model, tokenizer = thinker
    bias = dict.fromkeys(tokenizer.marks, 9.0) | {2: -99.0}
    prompt = [1, *tokenizer.encode("Hello")]
    scheduler = Scheduler(model, tokenizer, rows=2)
    scheduler.add(Request(prompt, max_tokens=40, logit_bias=bias))
    batched: list[Piece] = []
    while not (batched and batched[-1].finish_reason):
        batched += [piece for _, piece in scheduler.step()[0]]

    def biased(ids: object, logits: object) -> object:
        logits[:, list(bias)] += 9.0  # type: ignore[index]
        logits[:, 2] = -1e9  # type: ignore[index]
        return logits

    alone = list(stream_generate(model, tokenizer, prompt, max_tokens=40, logits_processors=[biased]))  # type: ignore[list-item]
    assert [i for piece in alone for i in piece.ids] == [i for piece in batched for i in piece.ids]
    assert told(alone) == told(batched)
    assert any(i in tokenizer.marks for piece in alone for i in piece.ids)
    for piece in alone:
        assert not set(tokenizer.marks) & set(piece.ids[:-1])
