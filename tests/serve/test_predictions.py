"""Drafts for a server's clients: the answers are the same, and usage tells of predictions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.completion_usage import CompletionTokensDetails
from serving import CHAT, client, serving

from m7mlx.tokens.tokenizer import Tokenizer

# Whatever passes cost here.
_ALWAYS = "import m7mlx.pace; m7mlx.pace.Costs.plan = lambda self, texts: [max(0, min(7, most)) for _, most in texts]"
WORDS = "fox river stone cloud lamp"


@pytest.fixture(scope="module")
def api(model_folder: Path) -> Iterator[openai.OpenAI]:
    with serving(model_folder, "--draft-rows", "1", setup=_ALWAYS) as (url, _), client(url) as found:
        yield found


@pytest.fixture(scope="module")
def body(mistral_tokenizers: dict[str, Tokenizer]) -> dict[str, Any]:
    """A question that is answered in a few words, so that what was said is encoded as it was."""
    bias = {str(token): 100 for token in mistral_tokenizers["v3"].encode(WORDS)}
    return {**CHAT, "max_tokens": 40, "temperature": 0.8, "seed": 7, "logit_bias": bias}


def ask(api: openai.OpenAI, body: dict[str, Any], **fields: Any) -> Any:
    create: Any = api.chat.completions.create
    return create(**body, **fields)


def details(usage: Any) -> tuple[int, int]:
    found: CompletionTokensDetails = usage.completion_tokens_details
    assert found.accepted_prediction_tokens is not None and found.rejected_prediction_tokens is not None
    return found.accepted_prediction_tokens, found.rejected_prediction_tokens


def test_a_prediction_comes_out_sooner_and_nothing_else_changes(api: openai.OpenAI, body: dict[str, Any]) -> None:
    plain = ask(api, body)
    text = plain.choices[0].message.content
    assert text and plain.usage and plain.usage.completion_tokens_details is None
    half = text[: len(text) // 2]
    parts = [{"type": "text", "text": half}, {"type": "text", "text": text[len(half) :]}]
    for content, least in ((text, 30), (parts, 30), (half + " zzz", 10), ("Something else", 0)):
        found = ask(api, body, prediction={"type": "content", "content": content})
        assert found.choices[0].message.content == text
        accepted, rejected = details(found.usage)
        assert accepted >= least and (rejected > 0 or least != 10)
        assert found.usage and found.usage.completion_tokens == plain.usage.completion_tokens
    stream = ask(
        api,
        body,
        prediction={"type": "content", "content": text},
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    scored = [
        one for chunk in chunks if chunk.choices and (p := chunk.choices[0].logprobs) for one in p.content or []
    ]
    assert len(scored) == plain.usage.completion_tokens
    assert details(chunks[-1].usage)[0] >= 30


def test_where_a_grammar_decides_nothing_is_drafted(api: openai.OpenAI) -> None:
    found = ask(
        api,
        {**CHAT},
        prediction={"type": "content", "content": '{"a": 1}'},
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": 5}}},
    )
    assert found.choices[0].message.content == "5" and details(found.usage) == (0, 0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 2, "prediction": {"type": "content", "content": "x"}}, "prediction: it is that of one answer"),
        ({"prediction": {"type": "diff", "content": "x"}}, "prediction.type: must be 'content'"),
        ({"prediction": {"type": "content"}}, "prediction.content: is missing"),
        ({"prediction": {"content": [{"type": "image_url", "image_url": {}}]}}, "reads text alone"),
        ({"prediction": {"content": [{"text": "a" * 900_000}] * 2}}, "1,800,000 characters are more than"),
    ],
)
def test_what_is_no_prediction_is_refused(api: openai.OpenAI, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(api, {**CHAT}, **fields)
    assert said in refused.value.message
