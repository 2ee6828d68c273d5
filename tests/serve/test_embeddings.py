"""Vectors of texts, by OpenAI's API and by Ollama's: those of the library."""

from __future__ import annotations

import asyncio
import base64
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import pytest
from m7mlx_serve import vector_room
from m7mlx_serve.embedding_job import EmbeddingJob
from m7mlx_serve.errors import ApiError
from serving import ENDLESS, NAME, client, settle

from m7mlx import InputError, Mistral, Tokenizer, embed, load
from m7mlx.decode import default_chunk

PATH = "/v1/embeddings"
TEXTS = ["Hello", "The window is sixteen tokens long, and this is longer. " * 3, "Bye"]


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Mistral, Tokenizer]:
    return load(model_folder)


def close(found: Any, expected: mx.array) -> None:
    np.testing.assert_allclose(np.array(found, np.float32), np.array(expected), rtol=1e-4, atol=1e-5)


def test_vectors_are_those_of_the_library(url: str, loaded: tuple[Mistral, Tokenizer]) -> None:
    """By the real client, which asks for Base64, in all forms of input."""
    expected = embed(*loaded, TEXTS, normalize=True)
    ids = [loaded[1].encode(text, add_bos=True) for text in TEXTS]
    with client(url) as api:
        found = api.embeddings.create(model=NAME, input=TEXTS)
        assert [one.index for one in found.data] == [0, 1, 2]
        close([one.embedding for one in found.data], expected)
        assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))
        close([one.embedding for one in api.embeddings.create(model=NAME, input=ids).data], expected)
        close(api.embeddings.create(model=NAME, input=ids[0]).data[0].embedding, expected[0])
        one = api.embeddings.create(model=NAME, input=TEXTS[0], encoding_format="float", dimensions=expected.shape[1])
        close(one.data[0].embedding, expected[0])
        last = api.embeddings.create(model=NAME, input=TEXTS, extra_body={"pooling": "last", "normalize": False})
        close([one.embedding for one in last.data], embed(*loaded, TEXTS, pooling="last"))
    told = httpx.post(url + PATH, json={"input": "Hello", "encoding_format": "base64"}, timeout=30).json()
    close(np.frombuffer(base64.b64decode(told["data"][0]["embedding"]), "<f4"), expected[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dimensions": 3}, "a part of them says nothing"), ({"pooling": "cls"}, "must be 'mean' or 'last'"),
        ({"input": [""] * 2049}, "2,048"), ({"input": []}, "input"), ({"input": [[1 << 31]]}, "vocabulary"),
        ({"input": [[1], [999_999]]}, "vocabulary"), ({"input": "x" * 1_000_001}, "1,000,000"),
        ({"input": ["x" * 600_000] * 2}, "send fewer"), ({"input_type": "query"}, "into the text"),
    ],
)  # fmt: skip
def test_refusals(url: str, changes: dict[str, Any], said: str) -> None:
    found = httpx.post(url + PATH, json={"input": "a"} | changes, timeout=30)
    assert (found.status_code, said in found.json()["error"]["message"]) == (400, True), found.text


def test_a_stream_goes_on_meanwhile(url: str) -> None:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**ENDLESS, "stream": True}, timeout=60) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        found = httpx.post(url + PATH, json={"input": "word " * 2000}, timeout=60)
        assert found.status_code == 200 and next(lines).startswith("data: ")
    settle(url, 0)


async def test_a_job_is_done_a_pass_at_a_time(loaded: tuple[Mistral, Tokenizer]) -> None:
    model, tokenizer = loaded
    chunk = default_chunk(model)
    prompts = [tokenizer.encode("word " * 3 * chunk)[: 3 * chunk], [1, 2]]
    job = EmbeddingJob(asyncio.get_running_loop(), prompts, "mean", normalize=True)
    steps = 1
    while not job.advance(model):
        steps += 1
    assert steps >= 3
    vectors = [np.frombuffer(vector, np.float32) for vector in await job.vectors]
    close(vectors, embed(model, tokenizer, prompts, normalize=True))
    wrong = EmbeddingJob(asyncio.get_running_loop(), [[]], "mean", normalize=True)
    assert wrong.advance(model)
    with pytest.raises(InputError, match="empty"):
        await wrong.vectors
    left = EmbeddingJob(asyncio.get_running_loop(), prompts, "mean", normalize=True)
    left.is_wanted = False
    assert left.advance(model) and not left.vectors.done()


async def test_vectors_share_a_bound_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few always find room; who does not read what it has asked for gives way."""
    monkeypatch.setattr(vector_room, "ROOM_SECONDS", 0.5)
    monkeypatch.setattr(vector_room, "READING_SECONDS", 0.0)
    room, size = vector_room.VectorRoom(1 << 20), 600 << 10
    first = await room.take(size)  # it is being made: that is not cut short
    assert await room.take(1 << 10)
    with pytest.raises(ApiError, match="ask for fewer") as full:
        await room.take(size)
    assert full.value.status == 503

    async def read() -> None:
        async with first.reading():
            await asyncio.Event().wait()  # for ever

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    second = await room.take(size)
    with pytest.raises(TimeoutError):
        await reader
    async with second.reading():
        pass
    huge = await room.take(2 << 20)  # alone, since there is nobody else
    huge.release()
    assert await room.take(size)


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")  # of Ollama's client
def test_ollamas_client(url: str, loaded: tuple[Mistral, Tokenizer]) -> None:
    with import_module("ollama").Client(host=url) as api:
        found = api.embed(model=NAME, input=TEXTS)
        close(found.embeddings, embed(*loaded, TEXTS, normalize=True))
        assert found.prompt_eval_count > 0 and len(api.embed(model=NAME, input="a").embeddings) == 1
        one = api.embeddings(model=NAME, prompt=TEXTS[0]).embedding  # as older clients ask
        close([one], embed(*loaded, TEXTS[:1], normalize=True))
