"""Schemas of strangers, prepared and followed in processes of their own.

They are bounded, remembered, and in nobody's way.
"""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psutil
import pytest
from models import small_config, small_model
from pydantic import BaseModel

from m7mlx import Piece, Request, constrain, generate, stream_generate
from m7mlx.constrain import CUT, Constraint, close_grammars, json_constraint
from m7mlx.errors import BusyError, InputError, WorkerError
from m7mlx.sampling import Sampling
from m7mlx.scheduler import Scheduler
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tools.schema import calls_schema
from m7mlx.worker import Worker

INTEGER = {"type": "integer"}
MODEL = small_model(small_config(vocab_size=32768, n_layers=1))


@pytest.fixture
def tokenizer(mistral_tokenizers: dict[str, Tokenizer]) -> Iterator[Tokenizer]:
    close_grammars()
    yield mistral_tokenizers["v3"]
    close_grammars()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def follows(tokenizer: Tokenizer, schema: dict[str, Any], text: str) -> bool:
    """Whether an answer that follows the schema can be this text."""
    constraint = json_constraint(tokenizer, schema)
    ids = tokenizer.encode("\n" + text)[len(tokenizer.encode("\n")) :]
    for token in ids:
        if not constraint.mask(tokenizer.vocab_size)[token].item():
            return False
        constraint.accept(token)
    return bool(constraint.mask(tokenizer.vocab_size)[sorted(tokenizer.eos_ids)[0]].item())


def chain(length: int) -> dict[str, Any]:
    links = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)}
    return {"$defs": {**links, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def crossed(width: int, height: int) -> dict[str, Any]:
    return {
        "allOf": [
            {
                "anyOf": [
                    {"type": "object", "properties": {f"p{i}_{j}": {"type": "string"}}, "required": [f"p{i}_{j}"]}
                    for j in range(width)
                ]
            }
            for i in range(height)
        ]
    }


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE = {
    "a chain that overflows the stack": chain(1500),
    "a number that takes for ever": {"type": "integer", "multipleOf": 3_000_017},
    "alternatives times alternatives": crossed(5, 9),
    "at which the library panics": crossed(4, 6),
    "nested deeply": nested(900),
    "nested so deeply that it cannot be written": nested(5000),
    "a pattern that has no end": {"type": "string", "pattern": "(" * 5000},
    "a lookahead": {"type": "string", "pattern": "(?=a)b"},
    "nothing fits it": {"type": "string", "enum": []},
    "no schema": {"type": 5},
    "of somebody else's": {"$ref": "file:///etc/passwd"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_one_line_and_harms_nobody(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(constrain, "_PREPARE_SECONDS", 1.0)
    before = json_constraint(tokenizer, INTEGER)
    own = psutil.Process().memory_info().rss
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(InputError, match="JSON schema") as caught:
            json_constraint(tokenizer, HOSTILE[name])
        said = str(caught.value)
        assert "\n" not in said and len(said) < 400
        assert not any(word in said for word in ("panic", "backtrace", "thread", ".rs", "Parser"))
    assert psutil.Process().memory_info().rss - own < 100 << 20
    assert before.mask(tokenizer.vocab_size).any().item()
    assert follows(tokenizer, INTEGER, "17")


def test_a_schema_that_takes_much_memory(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for megabytes in range(8, 256, 8):  # as little as will do for the vocabulary and a small schema
        monkeypatch.setattr(constrain, "_MEMORY", megabytes << 20)
        close_grammars()
        with suppress(InputError, WorkerError):
            before = json_constraint(tokenizer, INTEGER)
            break
    for _ in range(2):
        with pytest.raises(InputError, match=r"takes too much memory to prepare|too complex"):
            json_constraint(tokenizer, {"type": "string", "pattern": "(a?)" * 20_000})
    assert before.mask(tokenizer.vocab_size).any().item()


def test_a_schema_is_prepared_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "string", "pattern": "^[a-z]{3,40}$"}},
        "required": ["n"],
    }
    first = json_constraint(tokenizer, schema)
    there = children()
    with ThreadPoolExecutor(8) as pool:
        more = [one.result() for one in [pool.submit(json_constraint, tokenizer, schema) for _ in range(24)]]
    assert children() == there
    for constraint in (first, *more):
        assert constraint.mask(tokenizer.vocab_size).any().item()
    # Nothing has to be prepared any more: there is no time for it.
    monkeypatch.setattr(constrain, "_PREPARE_SECONDS", 0.0)
    assert follows(tokenizer, schema, '{"n":"abc"}')


def test_many_ask_for_a_bad_schema_at_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "_PREPARE_SECONDS", 0.3)
    schema = HOSTILE["a number that takes for ever"]

    def ask() -> str:
        with pytest.raises(InputError) as caught:
            json_constraint(tokenizer, schema)
        return str(caught.value)

    with ThreadPoolExecutor(6) as pool:
        said = {one.result() for one in [pool.submit(ask) for _ in range(6)]}
    assert said == {"the JSON schema cannot be used: it takes too long to prepare; make it simpler"}


def test_processes_are_few_and_end(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "_AT_ONCE", 2)
    monkeypatch.setattr(constrain, "_PREPARE_SECONDS", 0.5)
    monkeypatch.setattr(constrain, "_BUSY", 4)
    before = children()
    held = [json_constraint(tokenizer, {"const": n}) for n in range(2)]
    assert len(children() - before) == 3  # one for the vocabulary, of which the others are copies
    with pytest.raises(BusyError, match="under way; try again later"):
        json_constraint(tokenizer, {"const": 2})
    assert follows(tokenizer, {"const": 1}, "1")
    del held[0]
    gc.collect()
    for n in range(3, 9):  # in the place of those that nobody needs any more
        assert follows(tokenizer, {"const": n}, str(n))
        gc.collect()
    assert held[0].mask(tokenizer.vocab_size).any().item()
    assert len(children() - before) == 3
    close_grammars()
    assert children() == before
    with pytest.raises(InputError):
        held[0].mask(tokenizer.vocab_size)


def run(scheduler: Scheduler, until: int | None = None) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = {}
    more, steps = True, 0
    while more and steps != until:
        told, more = scheduler.step()
        for number, piece in told:
            found.setdefault(number, []).append(piece)
        steps += 1
    return found


@pytest.mark.parametrize("is_for_good", [False, True])
def test_a_grammar_whose_process_dies(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, is_for_good: bool
) -> None:
    """Another process goes on with its answers; where there can be none they fail, and no other."""
    scheduler = Scheduler(MODEL, tokenizer, rows=3)
    text = {"type": "string", "minLength": 60, "maxLength": 90}
    sampling = Sampling(temperature=1.0, seed=1)
    before = children()
    bad = scheduler.add(Request([1, 5], sampling, 200, constraint=json_constraint(tokenizer, text)))
    new = children() - before
    (pid,) = (pid for pid in new if psutil.Process(pid).ppid() in new)  # the copy that is the schema's
    good = scheduler.add(Request([1, 5], sampling, 200, constraint=json_constraint(tokenizer, {"enum": ["x" * 50]})))
    plain = scheduler.add(Request([1, 7], max_tokens=20))
    run(scheduler, until=6)
    os.kill(pid, signal.SIGSEGV)
    if is_for_good:
        monkeypatch.setattr(Worker, "copy", lambda _: Worker("no_such_module", restart=False))
    found = run(scheduler)
    if is_for_good:
        assert found[bad][-1].finish_reason == "failed" and isinstance(found[bad][-1].error, InputError)
    else:
        whole = generate(
            MODEL, tokenizer, [1, 5], sampling=sampling, max_tokens=200, constraint=json_constraint(tokenizer, text)
        )
        rest = "".join(piece.text for piece in found[bad])
        assert rest and whole.endswith(rest)
        assert found[bad][-1].finish_reason == "stop"
    assert found[good][-1].finish_reason == "stop"
    assert found[plain][-1].finish_reason in ("stop", "length")


def test_an_answer_that_the_grammar_did_not_allow_is_an_error(tokenizer: Tokenizer) -> None:
    constraint = json_constraint(tokenizer, INTEGER)
    constraint.mask(tokenizer.vocab_size)
    constraint.accept(tokenizer.encode("Paris")[0])
    for _ in range(2):  # and stays one
        with pytest.raises(InputError, match="cannot be used for this answer"):
            constraint.mask(tokenizer.vocab_size)


def test_masks_that_take_too_long_are_an_error(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "_SPENT_SECONDS", 0.0)
    monkeypatch.setattr(constrain, "_SPENT_EACH", 0.0)
    constraint = json_constraint(tokenizer, INTEGER)
    with pytest.raises(InputError, match="takes too long to follow"):
        constraint.mask(tokenizer.vocab_size)


def test_a_wide_object_is_followed(tokenizer: Tokenizer) -> None:
    wide = {"type": "object", "properties": {f"k{i}": INTEGER for i in range(300)}, "additionalProperties": False}
    assert follows(tokenizer, wide, '{"k1":5,"k200":7}')
    assert not follows(tokenizer, wide, '{"z":5}')
    assert not follows(tokenizer, wide, '{"k1":5')


STRING = {"type": "string", "minLength": 300}


def test_a_stop_text_does_not_make_half_an_answer_a_success(tokenizer: Tokenizer) -> None:
    def constraint() -> Constraint:
        return json_constraint(tokenizer, STRING)

    sampling = Sampling(temperature=1.0, seed=3)
    scheduler = Scheduler(MODEL, tokenizer)
    number = scheduler.add(Request([1, 5], sampling, 400, stop=["e"], constraint=constraint()))
    last = run(scheduler)[number][-1]
    assert (last.finish_reason, str(last.error)) == ("failed", CUT)
    with pytest.raises(InputError, match="would have cut it"):
        list(
            stream_generate(
                MODEL, tokenizer, [1, 5], sampling=sampling, max_tokens=400, stop=["e"], constraint=constraint()
            )
        )
    done = scheduler.add(
        Request([1, 5], sampling, 400, stop=["}"], constraint=json_constraint(tokenizer, {"const": 1}))
    )
    assert run(scheduler)[done][-1].finish_reason == "stop"


@pytest.mark.parametrize(("value", "stop"), [({"a": 1}, "}"), ([1, 2], "]"), ("ab", '"'), (-5, "5"), (125, "5")])
def test_nor_does_one_that_is_the_end_of_the_answer(tokenizer: Tokenizer, value: Any, stop: str) -> None:
    """An answer that ends in a stop text fails, for it would be cut off.

    Stop texts are not part of an answer: what is left would be no JSON, or not the JSON that was
    asked for.
    """
    scheduler = Scheduler(MODEL, tokenizer)
    number = scheduler.add(Request([1, 5], stop=[stop], constraint=json_constraint(tokenizer, {"const": value})))
    last = run(scheduler)[number][-1]
    assert (last.finish_reason, str(last.error)) == ("failed", CUT)
    with pytest.raises(InputError, match="would have cut it"):
        list(
            stream_generate(
                MODEL, tokenizer, [1, 5], stop=[stop], constraint=json_constraint(tokenizer, {"const": value})
            )
        )


def test_a_process_that_was_ended_is_not_the_schemas_fault(tokenizer: Tokenizer) -> None:
    """The next answer to a schema gets a new process.

    It gets one whether the schema's own process was ended, or that of the vocabulary.
    """
    for _ in range(2):
        assert follows(tokenizer, INTEGER, "17")
        own = psutil.Process().children()
        for process in [copy for one in own for copy in one.children()]:
            process.kill()
    for process in psutil.Process().children():
        process.kill()
    assert follows(tokenizer, {"const": "new"}, '"new"')
    assert follows(tokenizer, INTEGER, "17")


def test_ends_that_the_tokenizer_does_not_have(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config may name ids of a padded embedding, or beyond it."""
    own = tokenizer.eos_ids
    monkeypatch.setattr(tokenizer, "eos_ids", own | {tokenizer.vocab_size, 1 << 30})
    assert follows(tokenizer, {"const": "beyond"}, '"beyond"')
    close_grammars()
    monkeypatch.setattr(tokenizer, "eos_ids", frozenset({tokenizer.vocab_size}))
    with pytest.raises(InputError, match="no token that ends an answer"):
        json_constraint(tokenizer, INTEGER)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "x-guidance": {"whitespace_flexible": True}},
        {"type": "object", "properties": {"a": {"type": "string", "x-guidance": {"lenient": True}}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"x-guidance": {}}}},
    ],
)
def test_options_of_the_library_are_no_clients(tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="leave out 'x-guidance'"):
        json_constraint(tokenizer, schema)


class Inner(BaseModel):
    x: int


class Outer(BaseModel):
    one: Inner
    many: list[Inner]


class Node(BaseModel):
    name: str
    children: list[Node] = []


def test_calls_with_nested_models(tokenizer: Tokenizer) -> None:
    """References within a function's parameters hold in the schema of all calls.

    The parameters stand at another place there.
    """
    itself = {
        "type": "object",
        "properties": {"$ref": {"type": "string"}, "me": {"$ref": "#"}, "n": {"$ref": "#/properties/$ref"}},
        "additionalProperties": False,
    }
    literal = {"const": {"$ref": "#/nowhere"}}
    functions = [
        {"name": "f", "parameters": Outer.model_json_schema()},
        {"name": "g", "parameters": Node.model_json_schema()},
        {"name": "h", "parameters": itself},
        {"name": "i", "parameters": literal},
    ]
    schema = calls_schema(functions, parallel=False)
    right = [
        ("f", {"one": {"x": 1}, "many": [{"x": 2}, {"x": 3}]}),
        ("g", {"name": "a", "children": [{"name": "b", "children": []}]}),
        ("h", {"$ref": "a", "me": {"n": "b"}}),
        ("i", {"$ref": "#/nowhere"}),
    ]
    for name, arguments in right:
        written = json.dumps([{"name": name, "arguments": arguments}], separators=(",", ":"))
        assert follows(tokenizer, schema, written), written
    for name, arguments in [("f", {"one": {"x": "1"}, "many": []}), ("g", {"name": 1}), ("h", {"n": 1})]:
        written = json.dumps([{"name": name, "arguments": arguments}], separators=(",", ":"))
        assert not follows(tokenizer, schema, written), written


def test_calls_whose_parameters_name_themselves(tokenizer: Tokenizer) -> None:
    """Parameters may use anchors, and references behind an address of their own.

    Two functions may call their anchors alike.
    """

    def anchored(kind: str) -> dict[str, Any]:
        found = {"type": "object", "properties": {"x": {"$ref": "#here"}}, "additionalProperties": False}
        return found | {"$defs": {"y": {"$anchor": "here", "type": kind}}}

    address = "https://example.org/schema"
    inner = {"type": "object", "properties": {"z": {"$ref": f"{address}#/$defs/n"}}, "additionalProperties": False}
    behind = {"$id": address, "$ref": f"{address}#/$defs/o", "$defs": {"o": inner, "n": INTEGER}}
    functions = [
        {"name": "f", "parameters": anchored("integer")},
        {"name": "g", "parameters": anchored("boolean")},
        {"name": "h", "parameters": behind},
        {
            "name": "i",
            "parameters": {"properties": {"a": {"$ref": "#/definitions/b~1%25"}}, "definitions": {"b/%": INTEGER}},
        },
    ]
    schema = calls_schema(functions, parallel=False)
    for name, right, wrong in (
        ("f", '{"x":1}', '{"x":true}'),
        ("g", '{"x":true}', '{"x":1}'),
        ("h", '{"z":1}', '{"z":true}'),
        ("i", '{"a":1}', '{"a":true}'),
    ):
        assert follows(tokenizer, schema, f'[{{"name":"{name}","arguments":{right}}}]')
        assert not follows(tokenizer, schema, f'[{{"name":"{name}","arguments":{wrong}}}]')


@pytest.mark.parametrize(
    "parameters", [{}, {"description": "any"}, {"type": ["object", "null"]}, {"title": "t", "enum": [{}, 1]}]
)
def test_arguments_are_an_object(tokenizer: Tokenizer, parameters: dict[str, Any]) -> None:
    schema = calls_schema([{"name": "f", "parameters": parameters}], parallel=False)
    assert follows(tokenizer, schema, '[{"name":"f","arguments":{}}]')
    for other in ("1", "null", '"a"', "[]"):
        assert not follows(tokenizer, schema, f'[{{"name":"f","arguments":{other}}}]')


def test_parameters_that_are_no_object_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="JSON schema"):
        json_constraint(tokenizer, calls_schema([{"name": "f", "parameters": {"type": "string"}}], parallel=False))
