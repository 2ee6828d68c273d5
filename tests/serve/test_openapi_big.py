"""The server against its own OpenAPI document: schemathesis asks and checks the answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from m7mlx_serve.openapi import PATHS
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from serving import serving

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    with serving(model_folder, "--max-tokens", "3") as (found, _):
        yield found


@pytest.fixture(scope="module")
def described(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", PATHS)
def test_answers_are_as_described(described: Any, path: str, mode: GenerationMode) -> None:
    """Requests that fit the document, and such that do not."""
    for operation in [one.ok() for one in described.get_all_operations() if one.ok().path == path]:
        try_operation(operation, path, mode)


def try_operation(operation: Any, path: str, mode: GenerationMode) -> None:
    if not operation.body and not operation.path_parameters and mode is GenerationMode.NEGATIVE:
        return
    examples = 30 if operation.method != "post" else 200
    statuses = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=examples, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def check(case: Any) -> None:
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    check()
    if operation.method == "post":
        assert 400 in statuses if mode is GenerationMode.NEGATIVE else statuses & {200, 400}


def test_the_api_describes_itself(url: str) -> None:
    data = httpx.get(f"{url}/openapi.json").json()
    assert data["openapi"].startswith("3.1")
    assert set(data["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
    text = json.dumps(data)
    for name in re.findall(r'#/components/schemas/([^"]+)', text):
        assert name in data["components"]["schemas"]
    fields = data["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "tools", "response_format", "logit_bias", "stream"} <= set(fields)
    shown = httpx.get(f"{url}/docs")
    assert "POST /v1/chat/completions" in shown.text
    assert "default-src 'none'" in shown.headers["content-security-policy"]
