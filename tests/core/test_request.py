"""A request: refused in one line of text where no model could answer it.

Sent to another process, it arrives there the same.
"""

from __future__ import annotations

import inspect
import json
from array import array
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import small_config, small_model

from m7mlx import Request, Sampling, Tokenizer, stream_generate
from m7mlx.constrain import Unconstrained
from m7mlx.errors import InputError, PromptTooLongError, TokenizerError
from m7mlx.generation import Options
from m7mlx.request import prepare

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    "request_",
    [
        Request("Hello"),
        Request([1, 5, 9], Sampling(temperature=0.7, seed=3), None, ["a", "b"], at_start=False, begun=2),
        Request(MESSAGES, continues=[7, 8], logprobs=3, logit_bias={5: -1.5, 31999: 2.0}),
        Request(MESSAGES, continues="Once", max_tokens=0),
        Request("a", schema={"type": "object"}),
        Request(MESSAGES, tools=[{"name": "add", "parameters": {"type": "object"}}]),
    ],
)
def test_a_request_crosses_as_json(request_: Request) -> None:
    told = json.loads(json.dumps(request_.to_dict()))
    found = Request.from_dict(told)
    assert found.to_dict() == request_.to_dict()
    assert (found.prompt, found.sampling, found.logit_bias) == (
        request_.prompt,
        request_.sampling,
        request_.logit_bias,
    )


@pytest.mark.parametrize("ids", [mx.array([1, 2]), np.array([[1, 2]]), array("i", [1, 2]), (1, 2)])
def test_ids_cross_whatever_holds_them(ids: Any) -> None:
    told = json.loads(json.dumps(Request(ids, continues=ids, prediction=ids).to_dict()))
    assert told["prompt"] == told["continues"] == told["prediction"] == [1, 2]


def test_what_decides_here_is_only_told_of() -> None:
    """Another process takes the tokens of this one, in the same passes."""
    mine = Request([1], constraint=Unconstrained(), logits_processors=[lambda ids, logits: logits * 0])
    theirs = Request.from_dict(json.loads(json.dumps(mine.to_dict())))
    assert theirs.constraint is not None and not theirs.constraint.is_whole
    (process,) = theirs.logits_processors
    logits = mx.array([[1.0, 2.0]])
    assert process(mx.array([1]), logits) is logits


@pytest.mark.parametrize("told", [{}, {"prompt": "a", "colour": 1}, {"prompt": "a", "sampling": {"heat": 1}}])
def test_what_is_no_request_is_refused(told: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no request"):
        Request.from_dict(told)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"logprobs": -1}, "logprobs must be a whole number"),
        ({"logprobs": True}, "logprobs must be a whole number"),
        ({"logprobs": 1.5}, "logprobs must be a whole number"),
        ({"logits_processors": [1]}, "logits_processors must be a list of functions"),
        ({"logits_processors": len}, "logits_processors must be a list of functions"),
        ({"logits_processors": None}, "logits_processors must be a list of functions"),
        ({"constraint": Unconstrained(), "continues": [1]}, "cannot go on where it was broken off"),
        ({"schema": {}, "continues": "a"}, "cannot go on where it was broken off"),
        ({"max_tokens": -1}, "max_tokens must be a whole number"),
        ({"stop": "x"}, "stop must be a list of texts"),
        ({"sampling": None}, "sampling must be a Sampling"),
        ({"tools": [{"name": "add", "parameters": {}}]}, "tools go with messages"),
    ],
)
def test_what_no_model_could_answer_is_refused_in_a_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        Request([1], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"constraint": Unconstrained()}, {"schema": {"type": "object"}}])
def test_a_message_that_is_continued_follows_no_grammar(options: dict[str, Any]) -> None:
    begun: list[dict[str, Any]] = [*MESSAGES, {"role": "assistant", "content": '{"a": ', "prefix": True}]
    with pytest.raises(InputError, match="cannot continue a message") as caught:
        Request(begun, **options)
    assert "\n" not in str(caught.value)
    assert Request(begun).prompt == begun
    assert Request([*begun[:-1], begun[-1] | {"prefix": False}], **options).has_grammar


def test_what_one_model_can_answer(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = mistral_tokenizers["v1"]
    config = small_config(vocab_size=32000, sliding_window=None, max_position_embeddings=20, n_layers=1)
    model = small_model(config)
    cache = model.new_cache()
    ready = prepare(Request("Hello", continues=" there"), model, tokenizer, cache)
    assert ready.prompt == tokenizer.encode("Hello", add_bos=True)
    assert ready.ids == [*ready.prompt, *tokenizer.encode(" there")]
    assert not ready.at_start
    assert ready.max_tokens == 20 - len(ready.ids)  # what is left of the context
    assert prepare(Request(MESSAGES, max_tokens=3), model, tokenizer, cache).max_tokens == 3
    assert prepare(ready, model, tokenizer, cache) == ready
    with pytest.raises(PromptTooLongError):
        prepare(Request([1] * 21), model, tokenizer, cache)
    with pytest.raises(TokenizerError, match="logit_bias"):
        prepare(Request([1], logit_bias={32000: 1.0}), model, tokenizer, cache)


def test_tools_are_told_in_the_models_own_form(mistral_tokenizers: dict[str, Tokenizer]) -> None:
    model = small_model(small_config(vocab_size=32768, sliding_window=None, n_layers=1))
    cache = model.new_cache()
    add = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    asked: list[dict[str, Any]] = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "add", "content": "3"},
    ]
    v3 = mistral_tokenizers["v3"]
    for messages in (MESSAGES, asked):
        ready = prepare(Request(messages, tools=[add]), model, v3, cache)
        assert ready.prompt == v3.chat.encode(messages, [{"type": "function", "function": add}])
        assert not ready.tools and not ready.has_grammar  # it was trained for that
    assert prepare(Request(asked), model, v3, cache).prompt == v3.chat.encode(asked)
    # A model that knows no tools is told of them in words, and a grammar holds it to those.
    v1 = mistral_tokenizers["v1"]
    ready = prepare(Request(MESSAGES, tools=[add]), model, v1, cache)
    assert "# Tools" in v1.decode(ready.ids) and ready.constraint is not None
    assert not ready.constraint.is_whole
    ready.constraint.close()
    assert not prepare(Request(MESSAGES, tools=[add], continues="I"), model, v1, cache).has_grammar
    assert "<tool_response>\n3" in v1.decode(prepare(Request(asked), model, v1, cache).ids)


def test_generate_takes_what_stream_generate_takes() -> None:
    parameters = inspect.signature(stream_generate).parameters.values()
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(Options.__annotations__)
