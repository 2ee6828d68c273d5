"""Searching the Hub from the list of models: a Hub in miniature, asked by the real process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_harness import Chat, chatting
from hub_server import Hub, serve
from hub_server import environment as hub_environment
from m7mlx_chat import hub_search, jobs
from m7mlx_chat.hub_search import Files, Offer
from m7mlx_chat.screens.dialogs import Choose
from m7mlx_chat.screens.model_ways import ways_of_file, ways_on_hub
from m7mlx_chat.screens.models import Models
from models import small_config, write_folder
from textual.widgets import Input

from m7mlx.errors import RunError
from m7mlx.units import in_bytes


def listed(repo: str, *tags: str, **more: Any) -> dict[str, Any]:
    """A model as the Hub tells of it."""
    return {"id": repo, "modelId": repo, "tags": list(tags), "downloads": 5, "private": False, "gated": False} | more


def weights(**counts: int) -> dict[str, Any]:
    return {"parameters": counts, "total": sum(counts.values())}


LISTED = [
    listed("org/small-mistral", "mistral", "safetensors", downloads=70, safetensors=weights(BF16=1_000_000)),
    listed("org/mistral-4bit", "mistral", "mlx", "safetensors", downloads=90, safetensors=weights(U32=10, BF16=5)),
    listed("org/Mistral-AWQ", "mistral", "awq", "safetensors", gated="manual"),
    listed("org/mistral-wrapped", "safetensors", "mistral3", config={"model_type": "mistral3"}),
    listed("org/Ministral-GGUF", "gguf", gguf={"architecture": "llama", "total": 7_000_000_000}),
    # none of these can be used here
    listed("org/mistral-gemma-GGUF", "gguf", gguf={"architecture": "gemma3"}),
    listed("org/llama-like-mixtral-GGUF", "gguf", gguf={"architecture": "llama"}),
    listed("org/mistral-lora", "mistral", "safetensors", "base_model:adapter:org/mistral"),
    listed("org/mistral-bnb", "mistral", "safetensors", "bitsandbytes"),
    listed("org/mistral-pickle", "mistral", "pytorch"),
    listed("mistral", "mistral", "safetensors"),
    listed("org/mistral\x1b[2J", "mistral", "safetensors"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hub") / "repo", small_config(vocab_size=32768, n_layers=1))


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(folder, "org/small-mistral") as hub:
        hub.listed = LISTED
        for name, value in hub_environment(hub, tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        yield hub
        hub.hangs.clear()


async def typing(chat: Chat, text: str) -> Models:
    """The list of models, with this typed in it."""
    if not isinstance(chat.app.screen, Models):
        await chat.pilot.press("ctrl+o")
        await chat.settled()
    screen = chat.app.screen
    assert isinstance(screen, Models)
    screen.query_one(Input).value = text
    await chat.pilot.pause()
    return screen


def offered(screen: Models) -> list[str]:
    return [row.repo for row in screen._rows if isinstance(row, Offer)]


async def test_what_can_be_used_is_found_with_sizes(hub: Hub) -> None:
    found = {offer.repo: offer for offer in await jobs.search("stral")}
    assert list(found)[:2] == ["org/mistral-4bit", "org/small-mistral"]  # by downloads
    assert set(found) == {model["id"] for model in LISTED[:5]}
    assert found["org/small-mistral"].nbytes == 2_000_000 and found["org/small-mistral"].is_full
    assert found["org/mistral-4bit"].nbytes == 50 and found["org/mistral-4bit"].form == "MLX"
    assert not found["org/mistral-4bit"].is_full
    assert found["org/Mistral-AWQ"].is_packed and found["org/Mistral-AWQ"].is_gated
    assert found["org/Ministral-GGUF"].form == "GGUF" and found["org/Ministral-GGUF"].parameters == 7_000_000_000


async def test_a_model_is_searched_looked_at_and_fetched(hub: Hub, folder: Path, tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        screen = await typing(chat, "small-m")
        assert "search the Hub for “small-m”" in chat.shown()
        assert hub.requests == []  # nobody has asked for it
        await chat.pilot.press("ctrl+s")
        await chat.settled()
        assert offered(screen) == ["org/small-mistral"] and "70 downloads" in chat.shown()
        screen._choose(screen._rows[-1])
        await chat.settled()
        assert isinstance(chat.app.screen, Choose)
        size = (folder / "model.safetensors").stat().st_size
        assert f"Download it: {in_bytes(size)}" in chat.shown()
        assert "convert it to 4 bits: about 562 kB" in chat.shown()
        assert not any("/resolve/" in path for _, path, _ in hub.requests)  # until it is taken
        await chat.pilot.press("enter")
        await chat.settled()
        assert chat.session.settings.model == "org/small-mistral"
        assert (chat.engine.loaded[-1][0] / "model.safetensors").stat().st_size == size


async def test_a_key_ends_the_question_before(hub: Hub, tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        screen = await typing(chat, "nothing")
        hub.hangs.set()
        await chat.pilot.press("ctrl+s")
        while not hub.requests:
            await chat.pilot.pause(0.02)
        screen.query_one(Input).value = "4bi"
        await chat.pilot.pause()
        screen.query_one(Input).value = "4bit"
        await chat.pilot.pause()
        hub.hangs.clear()
        await chat.settled()
        assert offered(screen) == ["org/mistral-4bit"]
        paths = [path for _, path, _ in hub.requests if path.startswith("/api/models?")]
        searched = {path.partition("search=")[2].partition("&")[0] for path in paths}
        assert searched == {"nothing", "4bit"}  # what was typed on the way was not sent
        await chat.pilot.press("escape")
        assert offered(screen) == [] and chat.app.screen is screen
        before = len(hub.requests)
        await typing(chat, "mist")
        await asyncio.sleep(0.5)
        assert len(hub.requests) == before  # the search has ended
        await chat.pilot.press("escape")
        assert chat.app.screen is not screen


async def test_what_goes_wrong_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="no repository"):
        await jobs.list_files("org/none")
    hub.status = 403
    with pytest.raises(RunError, match="does not search now"):
        await jobs.search("mistral")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RunError, match="HF_HUB_OFFLINE"):
        await jobs.search("mistral")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.status = 200
    hub.listed = [{"id": "org/mistral", "tags": ["mistral"], "safetensors": {"parameters": 5}}]
    with pytest.raises(RunError, match="cannot be understood"):
        await jobs.search("mistral")
    hub.hangs.set()
    monkeypatch.setattr(jobs, "_ASK_SECONDS", 0.01)
    started = time.monotonic()
    with pytest.raises(RunError, match="does not answer"):
        await jobs.search("mistral")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("entry", [{}, {"id": 5, "tags": ["mistral"]}, {"id": "a/stral", "tags": [5, None]}])
def test_an_odd_answer_offers_nothing(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, ModelInfo

    monkeypatch.setattr(HfApi, "list_models", lambda *_, **__: [ModelInfo(**entry)])
    if "id" in entry and isinstance(entry["id"], str):
        assert hub_search.search("x") == []
    else:
        with pytest.raises(Exception, match="cannot be understood"):
            hub_search.search("x")


def test_the_ways_to_get_a_model() -> None:
    def ways(offer: Offer, files: Files) -> list[tuple[str, int | None, bool]]:
        return [(way.source, way.bits, way.fetches) for way in ways_on_hub(offer, files, 4)]

    full = Offer("o/n", 14_000, 7_000, 1, "safetensors", is_packed=False, is_full=True, is_gated=False)
    mlx = Offer("o/n", 4_000, 7_000, 1, "MLX", is_packed=False, is_full=False, is_gated=False)
    awq = Offer("o/n", 4_000, 7_000, 1, "safetensors", is_packed=True, is_full=False, is_gated=False)
    gguf = Offer("o/n", 0, 7_000, 1, "GGUF", is_packed=True, is_full=False, is_gated=False)
    assert ways(full, Files(14_000, False, {})) == [("o/n", None, True), ("o/n", 4, False)]
    assert ways(full, Files(14_000, True, {})) == [("o/n", 4, False)]
    assert ways(mlx, Files(4_000, False, {})) == [("o/n", None, True)]
    assert ways(awq, Files(4_000, False, {})) == [("o/n", None, False)]
    files = {"n-Q8_0.gguf": 9, "n-Q4_K_M.gguf": 5}
    assert ways(gguf, Files(0, False, files)) == [
        ("o/n/n-Q4_K_M.gguf", 4, False),
        ("o/n/n-Q8_0.gguf", None, False),
    ]
    assert ways(gguf, Files(0, False, {})) == []
    plan = {"result_bytes": 14_000, "parameters": 7_000}
    assert [way.bits for way in ways_of_file("f", 4_000, plan, 8)] == [8, None]  # it would grow
    assert [way.bits for way in ways_of_file("f", 14_000, plan, 8)] == [None, 8]
