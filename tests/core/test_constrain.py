"""Answers that follow a schema, whatever the model would rather say; with every tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from models import small_config, small_model

from m7mlx import Request, load
from m7mlx.constrain import json_constraint
from m7mlx.errors import InputError
from m7mlx.sampling import Sampler, Sampling
from m7mlx.scheduler import Scheduler
from m7mlx.tokens.tokenizer import Tokenizer

SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 12}},
        "required": ["a"],
        "additionalProperties": False,
    },
    {"enum": ["rot", "grün", "日本", "</s>", "[INST]"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {
        "type": "object",
        "properties": {"t": {"type": "string", "maxLength": 5}},
        "required": ["t"],
        "additionalProperties": False,
    },
]


def answer(model: Any, tokenizer: Tokenizer, schema: dict[str, Any] | None, seed: int, tokens: int = 120) -> str:
    ids = tokenizer.chat.encode([{"role": "user", "content": "Say it"}])
    scheduler = Scheduler(model, tokenizer)
    constraint = json_constraint(tokenizer, schema)
    scheduler.add(Request(ids, Sampling(temperature=1.0, seed=seed), tokens, constraint=constraint))
    text, more, reason = "", True, None
    while more:
        told, more = scheduler.step()
        text += "".join(piece.text for _, piece in told)
        reason = told[-1][1].finish_reason if told else reason
    assert reason in ("stop", "length")
    return text


@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_a_model_of_noise_says_what_fits(mistral_tokenizers: dict[str, Tokenizer], version: str, number: int) -> None:
    tokenizer, schema = mistral_tokenizers[version], SCHEMAS[number]
    # More ids than the tokenizer has, as padded embeddings have them: they are never chosen.
    model = small_model(small_config(vocab_size=tokenizer.vocab_size + 64, n_layers=1))
    for seed in range(5):
        value = json.loads(answer(model, tokenizer, schema, seed))
        if number == 0:
            assert 3 <= value["a"] <= 12
        elif number == 1:
            assert value in schema["enum"]
        elif number == 2:
            assert 2 <= len(value) <= 4 and all(isinstance(item, bool) for item in value)
        else:
            assert set(value) == {"t"} and len(value["t"]) <= 5


@pytest.mark.demo
def test_the_demo_model_answers_in_json(demo_model: Path) -> None:
    model, tokenizer = load(demo_model)
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string"}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    ids = tokenizer.chat.encode([{"role": "user", "content": "Name the capital of France."}])
    scheduler = Scheduler(model, tokenizer)
    scheduler.add(Request(ids, max_tokens=40, constraint=json_constraint(tokenizer, schema)))
    text, more = "", True
    while more:
        told, more = scheduler.step()
        text += "".join(piece.text for _, piece in told)
        assert not any(piece.error for _, piece in told)
    assert "Paris" in json.loads(text)["capital"]


@pytest.mark.parametrize(
    "schema", [{"type": "zebra"}, {"$ref": "http://10.0.0.1/schema"}, {"enum": []}, {"x": "y" * 300_000}]
)
def test_schemas_that_cannot_be_used(mistral_tokenizers: dict[str, Tokenizer], schema: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="JSON schema") as caught:
        json_constraint(mistral_tokenizers["v3"], schema)
    assert "\n" not in str(caught.value)


def test_bias_and_scores() -> None:
    logits = mx.array([[0.0, 1.0, 5.0, 2.0]])
    sampler = Sampler(Sampling(), bias={2: -100, 3: 0.5}, logprobs=2)
    assert not sampler.is_greedy
    assert sampler(logits).item() == 3
    (scored,) = sampler.scored
    expected = logits[0] - mx.logsumexp(logits)
    assert scored.ids.tolist() == [2, 3]  # the model's own, not the biased
    assert mx.allclose(scored.values, expected[mx.array([2, 3])]).item()
    assert mx.allclose(scored.logprob, expected[3:]).item()
