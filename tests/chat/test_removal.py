"""Deleting models from the list: ours and those in the Hub's cache, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from chat_harness import Chat, chatting
from m7mlx_chat.catalog import Entry, describe
from m7mlx_chat.removal import Removal, find_removal, remove
from m7mlx_chat.screens.dialogs import Choose
from m7mlx_chat.screens.models import Models
from models import small_config, write_folder

from m7mlx.errors import DiskError, InputError


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of the chat's own, and an empty cache of the Hub."""
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "data" / "models"
    write_folder(folder / "mine", small_config(vocab_size=32768, n_layers=1))
    return folder


def downloaded(hub: Path, own: Path, *revisions: str) -> Path:
    """A repository in the Hub's cache as huggingface_hub leaves it; its newest snapshot."""
    storage = hub / "models--org--name"
    (storage / "blobs").mkdir(parents=True)
    (storage / "refs").mkdir()
    for revision in revisions:
        snapshot = storage / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for file in (own / "mine").iterdir():
            blob = storage / "blobs" / f"{file.name}-of-all"
            if not blob.exists():
                shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (storage / "refs" / "main").write_text(revisions[-1])
    return storage / "snapshots" / revisions[-1]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def test_a_model_of_ours(own: Path) -> None:
    write_folder(own / "other", small_config(vocab_size=32768, n_layers=1))
    folder, nbytes = own / "mine", size(own / "mine")
    removal = find_removal(describe(str(folder), folder), own, [own / "other"])
    assert removal == Removal(folder, nbytes, is_shared=False)
    assert remove(removal) == nbytes
    assert not folder.exists() and (own / "other").exists()
    with pytest.raises(DiskError, match="could not be deleted"):
        remove(removal)


def test_all_revisions_in_the_hubs_cache(own: Path, tmp_path: Path) -> None:
    snapshot = downloaded(tmp_path / "hub", own, "a" * 40, "b" * 40)
    other = tmp_path / "hub" / "models--org--other"
    shutil.copytree(snapshot.parent.parent, other, symlinks=True)
    (tmp_path / "hub" / "models--org--broken").mkdir()
    entry = describe("org/name", snapshot)
    assert entry.problem == ""
    removal = find_removal(entry, own, [])
    assert removal == Removal(snapshot.parent.parent, size(own / "mine"), is_shared=True)
    assert remove(removal) == size(own / "mine")
    assert not snapshot.parent.parent.exists()
    assert size(other) == size(own / "mine") + 40  # nothing of others


def test_what_cannot_be_deleted(own: Path, tmp_path: Path) -> None:
    mine = describe("mine", own / "mine")
    elsewhere = write_folder(tmp_path / "elsewhere", small_config(vocab_size=32768, n_layers=1))
    (tmp_path / "hub" / "models--org--x" / "snapshots" / "main").mkdir(parents=True)
    stray = tmp_path / "hub" / "models--org--x" / "snapshots"
    (stray / "file").touch()  # nothing that huggingface_hub leaves
    for entry, loaded, why in (
        (mine, [own / "." / "mine"], "in use"),
        (Entry("mistral", None, 0), [], "not on this machine"),
        (Entry("m:7b", None, 0, file=tmp_path / "blob", owner="Ollama"), [], "this is Ollama's"),
        (Entry("org/Name", elsewhere, 0, owner="LM Studio"), [], "this is LM Studio's"),
        (describe("elsewhere", elsewhere), [], "a folder of your own"),
        (describe("inside", own / "mine" / "deeper"), [], "a folder of your own"),
        (Entry("models", own, 0), [], "a folder of your own"),
        (Entry("stray", stray, 0), [], "a folder of your own"),
        (Entry("stray", stray / "main", 0), [], "is damaged"),
    ):
        with pytest.raises(InputError, match=why):
            find_removal(entry, own, loaded)


def test_of_a_link_only_the_link(own: Path, tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", small_config(vocab_size=32768, n_layers=1))
    (own / "linked").symlink_to(elsewhere)
    removal = find_removal(describe("linked", own / "linked"), own, [])
    assert remove(removal) == 0
    assert not (own / "linked").is_symlink() and (elsewhere / "model.safetensors").exists()


async def ask_to_delete(chat: Chat, name: str) -> None:
    await chat.pilot.press("ctrl+o")
    await chat.settled()
    screen = chat.app.screen
    assert isinstance(screen, Models)
    await chat.pilot.press(*name, "down", "ctrl+d")
    await chat.settled()


async def test_a_model_is_deleted_after_a_question(own: Path, tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await ask_to_delete(chat, "mine")
        assert isinstance(chat.app.screen, Choose)
        assert "Delete mine?" in chat.shown() and "frees" in chat.shown()
        await chat.pilot.press("enter")  # the first way keeps it
        await chat.settled()
        assert (own / "mine").exists()
        await chat.pilot.press("ctrl+d")
        await chat.settled()
        await chat.pilot.press("down", "enter")
        await chat.settled()
        assert not (own / "mine").exists()
        assert "mine is deleted" in chat.told() and "are free again" in chat.told()
        screen = chat.app.screen
        assert isinstance(screen, Models) and not any(isinstance(r, Entry) and r.folder for r in screen._rows)


@pytest.mark.parametrize("ready", [True, False])
async def test_the_model_in_use_is_not_deleted(own: Path, tmp_path: Path, ready: bool) -> None:
    async with chatting(tmp_path, model=own / "mine", ready=ready) as chat:  # in use while it loads, too
        await ask_to_delete(chat, "mine")
        assert "in use" in chat.told()
        assert (own / "mine").exists()
