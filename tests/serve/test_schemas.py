"""The fields of a request: what cannot be met is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from serving import CHAT, NAME, user


def schema(wanted: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": wanted}}}


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no messages": ({"messages": []}, 400, "messages"),
    "another model": ({"model": "/etc"}, 404, "not served here"),
    "a repository": ({"model": "evil/repo"}, 404, "not served here"),
    "negative temperature": ({"temperature": -1}, 400, "temperature"),
    "n of 0": ({"n": 0}, 400, "n: "),
    "too many": ({"n": 9}, 400, "n: "),
    "logit_bias": ({"logit_bias": {"99999999": 5}}, 400, "logit_bias"),
    "response_format": ({"response_format": {"type": "yaml"}}, 400, "response_format"),
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "zebra"}}}},
        400,
        "the JSON schema cannot be used",
    ),
    "a schema left out": ({"response_format": {"type": "json_schema"}}, 400, "json_schema"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools"),
    "no tools to call": ({"tool_choice": "required"}, 400, "there are no tools"),
    "logprobs": ({"top_logprobs": 3}, 400, "logprobs"),
    "too many logprobs": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "a word to bias": ({"logit_bias": {"cat": 5}}, 400, "logit_bias"),
    "penalty": ({"presence_penalty": 2.5}, 400, "presence_penalty: must be at most 2"),
    "empty stop": ({"stop": ""}, 400, "stop"),
    "unknown field": ({"temprature": 1}, 400, "temprature"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1"}}]}]},
        400,
        "messages",
    ),
    "a role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role"),
    "two system messages at the end": ({"messages": [{"role": "assistant", "content": "x"}]}, 400, ""),
    "stream_options alone": ({"stream_options": {"include_usage": True}}, 400, "stream"),
    "many stops": ({"stop": [f"s{i}" for i in range(65)]}, 400, "stop"),
    "a stop of 4 MB": ({"stop": "x" * 4_000_000}, 400, "stop"),
    "a bias for everybody": ({"logit_bias": {str(i): 1 for i in range(2000)}}, 400, "logit_bias"),
    "a bias in other digits": ({"logit_bias": {"٣": 1}}, 400, "logit_bias"),
    "one that fails of several": ({"n": 8, "logit_bias": {"99999999": 1}}, 400, "vocabulary"),
    "a message of 4 MB": ({"messages": user("word " * 790_000)}, 400, "messages"),
    "7 MB of messages": ({"messages": user("x" * 990_000) * 7}, 400, "characters are more than"),
    "a schema that is itself": (schema({"$ref": "#"}), 400, "nothing fits it"),
    "a schema from elsewhere": (schema({"$ref": "http://10.0.0.1/x"}), 400, "cannot be used"),
    "a schema of this machine's": (schema({"$ref": "file:///etc/passwd"}), 400, "cannot be used"),
    "a schema of too many others": (
        schema({"allOf": [{"anyOf": [{"required": [f"p{i}{j}"]} for j in range(6)]} for i in range(9)]}),
        400,
        "cannot be used",
    ),
    "true for a number": ({"max_tokens": True}, 400, "max_tokens"),
    "a number for true": ({"logprobs": 1}, 400, "logprobs"),
    "a fraction for a number": ({"n": 1.0}, 400, "n: "),
    "a large seed": ({"seed": 1 << 63}, 400, "seed"),
    "text for a number": ({"max_tokens": "many"}, 400, "max_tokens"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", list(REFUSED))
def test_requests_that_cannot_be_met_are_refused(url: str, name: str, stream: bool) -> None:
    changes, status, reason = REFUSED[name]
    if "stream_options" in changes and stream:
        return
    found = httpx.post(f"{url}/v1/chat/completions", json=CHAT | changes | {"stream": stream}, timeout=30)
    assert found.status_code == status
    error = found.json()["error"]
    assert reason in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("field", "status"),
    [
        (b'"temperature": 1e400', 400),
        (b'"temperature": 1e-400', 200),
        (b'"temperature": -0.0', 200),
        (b'"temperature": 9, "temperature": 0', 200),  # the last one counts
        (b'"seed": ' + b"9" * 5000, 400),
        (b'"user": "\xf0\x9f\x98\x80\xe2\x80\xae\\u0000"', 200),
        (b'"stop": "\\u0000"', 200),
        (b'"stop": "\\ud800"', 400),
        (b'"\\uDFFF": 1', 400),
        (b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["\\ud800"]}}}', 400),
        (b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "number", "maximum": 1e999}}}', 400),  # noqa: E501
        (b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "^(a+)+$"}}}', 200),
        (b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"maxItems": 1000000000}}}', 200),
    ],
)  # fmt: skip
def test_what_json_can_say(url: str, field: bytes, status: int) -> None:
    body = json.dumps(CHAT).encode()[:-1] + b", " + field + b"}"
    found = httpx.post(
        f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}, timeout=30
    )
    assert found.status_code == status


def test_ids_outside_the_vocabulary_never_reach_the_model(url: str) -> None:
    for ids in ([10_000_000], [-1], [1 << 70]):
        found = httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": ids}, timeout=30)
        assert found.status_code == 400
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
