"""Who is let in, and what a request may weigh: hosts, origins, keys, lengths, paths, pages."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import httpx
import openai
import pytest
from serving import CHAT, NAME, client, serving, user


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"\xff\xfe{}", {}, 400),
        (b"", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"a":' * 100 + b"1" + b"}" * 100, {}, 400),
        (json.dumps(CHAT | {"temperature": float("nan")}).encode(), {}, 400),
        (json.dumps(CHAT).encode(), {"Content-Type": "text/plain"}, 415),
        (json.dumps(CHAT).encode(), {"Host": "evil.example"}, 403),
        (json.dumps(CHAT).encode(), {"Host": "127.0.0.1.evil.example:80"}, 403),
        (json.dumps(CHAT).encode(), {"Origin": "http://evil.example"}, 403),
        (json.dumps(CHAT).encode(), {"Origin": "null"}, 403),
        (b" " * (9 << 20), {}, 413),
        (b'"' + b"[" * 1000 + b'"', {}, 400),  # brackets in a string are no depth
        (b'"' + b'\\"' * 100_000, {}, 400),  # a string without an end
    ],
)
def test_what_is_sent_is_bounded(url: str, body: bytes, headers: dict[str, str], status: int) -> None:
    given = {"Content-Type": "application/json"} | headers
    found = httpx.post(f"{url}/v1/chat/completions", content=body, headers=given, timeout=30)
    assert found.status_code == status
    assert found.json()["error"]["message"]
    assert "access-control-allow-origin" not in found.headers


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "application/json; charset=utf-8"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_programs_need_not_say_that_a_body_is_json(url: str, path: str, kind: str | None) -> None:
    """litellm says nothing to Ollama's API, and curl -d that it is a form; pages must say it."""
    short: dict[str, object] = {"options": {"num_predict": 1}} if path == "/api/chat" else {"max_tokens": 1}
    body = json.dumps({"messages": user("Hi"), "stream": False} | short)
    said = {} if kind is None else {"Content-Type": kind}
    assert httpx.post(url + path, content=body.encode(), headers=said, timeout=30).status_code == 200
    for more in ({"Origin": url}, {"Sec-Fetch-Site": "cross-site"}):
        found = httpx.post(url + path, content=body.encode(), headers=said | more, timeout=30)
        assert found.status_code == (200 if kind and "json" in kind else 415)


def test_lengths_that_lie(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    for length, status in ((b"-1", b"400"), (b"99999999999", b"413"), (b"x", b"400")):
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: " + length + b"\r\n\r\n{}"
            )
            assert status in raw.recv(100).splitlines()[0]


def test_paths_and_methods_that_are_not_there(url: str) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/x", 404),
    ):
        found = httpx.request(method, url + path)
        assert (found.status_code, found.json()["error"]["type"]) == (status, "invalid_request_error")
    pulled = httpx.post(f"{url}/api/pull", json={"model": "x"})
    assert pulled.status_code == 404 and pulled.json()["error"].startswith("there is nothing at /api/pull")
    assert httpx.get(f"{url}/api/chat").json()["error"].startswith("/api/chat does not take GET")
    batches = httpx.post(f"{url}/v1/messages/batches", json={})
    assert (batches.status_code, batches.json()["error"]["type"]) == (404, "not_found_error")


def test_the_page_may_run_nothing_but_its_own(url: str) -> None:
    page = httpx.get(url)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script src=" in page.text and "onclick" not in page.text
    assert httpx.get(f"{url}/page.js").headers["content-type"].startswith("text/javascript")
    assert "innerHTML" not in httpx.get(f"{url}/page.js").text
    assert httpx.get(f"{url}/page.css").status_code == 200


def test_a_key_is_asked_for(model_folder: Path, tmp_path: Path) -> None:
    key = "a-key-of-some-length-1234"
    (tmp_path / "key").write_text(key + "\n")
    with serving(model_folder, "--api-key-file", str(tmp_path / "key")) as (url, _):
        for path, status in (("/health", 200), ("/", 200), ("/v1/models", 401), ("/metrics", 401)):
            assert httpx.get(url + path).status_code == status
        with pytest.raises(openai.AuthenticationError), client(url, "wrong") as api:
            api.models.list()
        with client(url, key) as api:
            assert api.chat.completions.create(model=NAME, messages=user("Hi"), max_tokens=1).choices
