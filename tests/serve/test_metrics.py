"""The figures of /metrics: each request is counted once, and nothing tells what was asked."""

from __future__ import annotations

import re

import httpx
from serving import CHAT, ENDLESS, Question, client, settle


def figures(url: str) -> dict[str, float]:
    found = re.findall(r"^(m7mlx_[^ #]+) (\S+)$", httpx.get(f"{url}/metrics").text, re.M)
    return {name: float(value) for name, value in found}


def test_metrics(url: str) -> None:
    before = figures(url)
    with client(url) as api:
        question: Question = {**CHAT, "temperature": 0, "max_tokens": 5, "logit_bias": {"2": -100}}
        whole = api.chat.completions.create(**question)
        list(api.chat.completions.create(**question, stream=True))
        left = api.chat.completions.create(**ENDLESS, stream=True)
        for _ in range(4):
            next(left)
        running = figures(url)
        left.close()
        settle(url, 0)
        assert whole.usage
    for path in ("/v1/chat/completions", "/v1/what/ever", "/no/such/path"):
        httpx.post(url + path, json={})
    httpx.get(f"{url}/v1/models/x")
    httpx.get(url, headers={"Host": "evil.example"})
    after = figures(url)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    def requests(path: str, status: int) -> float:
        return more(f'm7mlx_requests_total{{path="{path}",status="{status}"}}')

    assert (requests("/v1/chat/completions", 200), requests("/v1/chat/completions", 400)) == (3, 1)
    assert (requests("other", 404), requests("/v1/models/…", 404), requests("/", 403)) == (2, 1, 1)
    assert running["m7mlx_requests_running"] == 1 and running["m7mlx_requests_waiting"] == 0
    assert (after["m7mlx_requests_running"], after["m7mlx_open_requests"]) == (0, 0)
    assert more('m7mlx_tokens_total{kind="prompt"}') == 3 * whole.usage.prompt_tokens
    assert more('m7mlx_tokens_total{kind="generated"}') >= 5 + 5 + 3  # of the one that was left, as far as it came
    assert not any("reused" in name or "cached" in name for name in after)
    assert more('m7mlx_answers_total{reason="length"}') == 2 and more('m7mlx_answers_total{reason="left"}') == 1
    assert more("m7mlx_time_to_first_token_seconds_count") == 3
    assert more("m7mlx_time_per_output_token_seconds_count") == 3
    assert more("m7mlx_time_per_output_token_seconds_sum") > 0
