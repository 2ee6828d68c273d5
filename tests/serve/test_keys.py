"""Several keys: nothing that one has asked is of use to another, or told to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from m7mlx_serve.cli import main
from serving import NAME, client, serving, user

KEYS = ["the-first-key-0123456789", "the-other-key-0123456789"]
LONG = "The window is sixteen tokens long. " * 8


@pytest.fixture(scope="module")
def server(chatml_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# who may ask\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    with serving(chatml_folder, "--api-key-file", str(file)) as (url, _):
        yield url


def reused(url: str, key: str, text: str) -> list[int]:
    """How much of a prompt was held, as each API tells it."""
    headers = {"Authorization": f"Bearer {key}"}
    told = []
    for path, body, where in (
        ("/v1/chat/completions", {"messages": user(text), "n": 2}, ("prompt_tokens_details", "cached_tokens")),
        ("/v1/responses", {"input": text}, ("input_tokens_details", "cached_tokens")),
        ("/v1/messages", {"messages": user(text), "max_tokens": 1}, ("cache_read_input_tokens",)),
    ):
        limit = {"max_output_tokens": 1} if "input" in body else {"max_tokens": 1}
        found: Any = httpx.post(url + path, json=body | limit, headers=headers, timeout=60).json()["usage"]
        for name in where:
            found = found[name]
        told.append(found)
    return told


def test_each_key_has_its_own_conversations(server: str) -> None:
    """The first of a key's requests finds nothing, whatever others have asked."""
    with client(server, KEYS[0]) as first, client(server, KEYS[1]) as other:
        for api in (first, other, first):
            found = api.chat.completions.create(model=NAME, messages=user(LONG), max_tokens=1, n=1)
            assert found.usage and found.usage.prompt_tokens_details
            cached = found.usage.prompt_tokens_details.cached_tokens
            assert cached == 0 if api is other else cached in (0, found.usage.prompt_tokens - 1)
        assert cached and reused(server, KEYS[1], LONG) == [cached] * 3
        whole = httpx.post(
            f"{server}/v1/messages", json={"messages": user(LONG), "max_tokens": 1}, headers={"x-api-key": KEYS[0]}
        ).json()
        assert whole["usage"]["input_tokens"] == 1
        held = first.responses.create(model=NAME, input="a", max_output_tokens=1)
        assert first.responses.retrieve(held.id).id == held.id
        for refused in (
            lambda: other.responses.retrieve(held.id),
            lambda: other.responses.delete(held.id),
            lambda: other.responses.create(model=NAME, input="b", previous_response_id=held.id),
        ):
            with pytest.raises(openai.NotFoundError):
                refused()
        assert first.responses.retrieve(held.id).id == held.id
    with client(server, "the-third-key-0123456789") as api, pytest.raises(openai.AuthenticationError):
        api.models.list()


@pytest.mark.parametrize("text", ["", "# none\n", f"{KEYS[0]}\nshort\n", f"{KEYS[0]}é\n"])
def test_files_without_keys(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text(text)
    assert main(["--model", "/no/such/model", "--api-key-file", str(tmp_path / "keys")]) == 2
    assert "must be a key of at least 16 ASCII characters" in capsys.readouterr().err
