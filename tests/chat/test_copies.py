"""Conversations that go on at once: what was read lies on the disk, bound, private, replaceable."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from chat_harness import Chat, environment_in
from m7mlx_chat import copies, loaded
from m7mlx_chat.app import ChatApp
from m7mlx_chat.config import Config
from m7mlx_chat.engine import Engine
from m7mlx_chat.session import Session
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import Store
from m7mlx_chat.view import Parts
from m7mlx_chat.widgets.ring import RingPicture
from models import random_weights, small_config, write_folder

from m7mlx.errors import DiskError

QUESTION = "word " * 400
ANSWER = 8  # tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a window that a few hundred tokens fill."""
    config = small_config(vocab_size=32768, sliding_window=300, n_layers=2, head_dim=32)
    return write_folder(tmp_path_factory.mktemp("copies") / "model", config)


class Real(Chat):
    """The app with an engine that computes."""

    engine: Engine  # type: ignore[assignment]

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait for something that other threads do."""
        deadline = time.monotonic() + 30
        while not done():
            assert time.monotonic() < deadline, self.notices()
            await self.pilot.pause(0.02)

    async def answered(self, text: str) -> dict[str, object]:
        """Send a message; returns what its answer cost."""
        await self.send(text)
        await self.until(lambda: self.session.under_way is None and not self.app.composer.text)
        return self.store.message(self.session.line[-1]).statistics

    def last_ids(self) -> list[int] | None:
        return self.store.message(self.session.line[-1]).ids


@asynccontextmanager
async def chat_with(
    model: Path,
    folder: Path,
    *,
    keeps: bool = True,
    **changes: object,
) -> AsyncIterator[Real]:
    """The chat over its files in `folder`, from its start to its end."""
    settings = Settings(model=str(model), max_tokens=ANSWER).changed({"kv_disk_bits": 32, **changes})
    environment = environment_in(folder)
    with Store(folder / "chats.db") as store:
        engine = Engine(copies=environment.copies if keeps else None)
        session = Session(store, engine, settings)
        app = ChatApp(Parts(engine, session, Config(environment.config), environment), folder=model)
        try:
            async with app.run_test(size=(120, 40), notifications=True) as pilot:
                chat = Real(app, engine, session, pilot)  # type: ignore[arg-type]
                await chat.until(lambda: session.ready is not None)
                yield chat
        finally:
            engine.close()


def files(folder: Path) -> list[Path]:
    place = environment_in(folder).copies
    return sorted(place.iterdir()) if place.exists() else []


async def test_a_conversation_that_is_opened_again_reads_only_what_is_new(model: Path, tmp_path: Path) -> None:
    async with chat_with(model, tmp_path / "a") as chat:
        await chat.answered(QUESTION)
        expected = await chat.answered("more")
        ids = chat.last_ids()
    async with chat_with(model, tmp_path / "b") as chat:
        await chat.answered(QUESTION)
        assert not files(tmp_path / "b")
    (file,) = files(tmp_path / "b")
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    async with chat_with(model, tmp_path / "b") as chat:
        await chat.app.open_conversation(1)
        cost = await chat.answered("more")
        assert cost["reused_tokens"] == expected["reused_tokens"] > 400 and cost["from_disk"]  # type: ignore[operator]
        assert chat.last_ids() == ids
        await chat.pilot.press("f3", "f4")
        await chat.pilot.pause()
        assert "1 conversation" in str(chat.app.screen_stack[0].query_one(RingPicture).content)
        figures = chat.shown()
        assert "on the disk: 1 conversation" in figures and "(disk)" in figures
    assert len(files(tmp_path / "b")) == 1  # the copy of now is in the place of the one before


async def test_what_is_left_is_copied_and_8_bits_are_smaller(model: Path, tmp_path: Path) -> None:
    sizes = []
    for bits in (32, 8):
        async with chat_with(model, tmp_path / str(bits), kv_disk_bits=bits) as chat:
            await chat.answered(QUESTION)
            await chat.app.action_new()
            await chat.answered("x")
            await chat.until(lambda bits=bits: len(files(tmp_path / str(bits))) == 1)  # type: ignore[misc]
            sizes.append(files(tmp_path / str(bits))[0].stat().st_size)
        async with chat_with(model, tmp_path / str(bits), kv_disk_bits=bits) as chat:
            await chat.app.open_conversation(1)
            assert (await chat.answered("more"))["from_disk"]
    assert sizes[1] < 0.4 * sizes[0]


async def test_when_it_is_quiet_and_after_a_kill(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy is made between questions; what a killed process was writing harms nobody."""
    monkeypatch.setattr(loaded, "_QUIET_SECONDS", 0.05)
    async with chat_with(model, tmp_path) as chat:
        await chat.answered(QUESTION)
        await chat.until(lambda: bool(chat.session.on_disk and chat.session.on_disk.conversations))
    script = f"""
        import os, signal, sys, time
        from pathlib import Path
        import m7mlx.cache_file as cache_file
        from m7mlx import load
        from m7mlx.cache_folder import CacheFolder
        from m7mlx.decode import prefill
        from m7mlx.memory import UNDO_SLACK

        cache_file.sync = lambda file: (print("writing", flush=True), time.sleep(60))
        model, _ = load({str(model)!r})
        cache = model.new_cache(slack=UNDO_SLACK)
        prefill(model, list(range(5, 400)), cache)
        CacheFolder(Path({str(environment_in(tmp_path).copies)!r}), model, cache.like(), 10**9).save(cache, "1")
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        os.kill(process.pid, signal.SIGKILL)
    assert len(files(tmp_path)) == 2  # one of them was being written
    async with chat_with(model, tmp_path) as chat:
        await chat.app.open_conversation(1)
        assert (await chat.answered("more"))["from_disk"]


@pytest.mark.parametrize("harm", ["a byte", "half"])
async def test_a_damaged_copy_is_ignored_and_removed(model: Path, tmp_path: Path, harm: str) -> None:
    async with chat_with(model, tmp_path) as chat:
        await chat.answered(QUESTION)
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data if harm == "a byte" else data[: len(data) // 2])
    async with chat_with(model, tmp_path) as chat:
        await chat.app.open_conversation(1)
        cost = await chat.answered("more")
        assert cost["reused_tokens"] == 0 and "from_disk" not in cost
    assert file not in files(tmp_path) and len(files(tmp_path)) == 1


async def test_other_weights_do_not_use_it(model: Path, tmp_path: Path) -> None:
    async with chat_with(model, tmp_path) as chat:
        await chat.answered(QUESTION)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = small_config(vocab_size=32768, sliding_window=300, n_layers=2, head_dim=32)
    write_folder(other, config, random_weights(config, seed=1))
    async with chat_with(other, tmp_path) as chat:
        await chat.app.open_conversation(1)
        assert (await chat.answered("more"))["reused_tokens"] == 0
    assert len(files(tmp_path)) == 2  # one with each model


async def test_a_full_disk_is_told_and_the_chat_lives(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise DiskError("x could not be written: the disk may be full")

    monkeypatch.setattr(loaded, "_QUIET_SECONDS", 0.05)
    monkeypatch.setattr("m7mlx.cache_folder.save_cache", full)
    async with chat_with(model, tmp_path) as chat:
        await chat.answered(QUESTION)
        await chat.until(lambda: "disk may be full" in chat.notices())
        await chat.answered("and on")
        monkeypatch.setattr(copies, "_SPARED", 1 << 60)
        await chat.answered(QUESTION)
        await chat.until(lambda: "is not copied there" in chat.notices())
    monkeypatch.setattr(copies, "_SPARED", 0)
    assert not files(tmp_path)
    async with chat_with(model, tmp_path, kv_disk=0.00001) as chat:
        await chat.app.open_conversation(1)
        await chat.answered("more")
        await chat.until(lambda: "kv_disk" in chat.notices())
    (tmp_path / "data" / "copies").rmdir()
    (tmp_path / "data" / "copies").write_text("no folder")
    async with chat_with(model, tmp_path) as chat:
        await chat.app.open_conversation(1)
        await chat.answered("more")
        await chat.until(lambda: "cannot be used" in chat.notices())


@pytest.mark.parametrize("how", ["no_save", "kv_disk 0"])
async def test_nothing_is_kept_where_that_is_wanted(model: Path, tmp_path: Path, how: str) -> None:
    async with chat_with(model, tmp_path, keeps=how != "no_save", kv_disk=0 if how == "kv_disk 0" else 8) as chat:
        await chat.answered(QUESTION)
        assert chat.session.on_disk is None
    assert not files(tmp_path)


async def test_a_deleted_conversation_leaves_the_disk(model: Path, tmp_path: Path) -> None:
    async with chat_with(model, tmp_path) as chat:
        await chat.answered(QUESTION)
    async with chat_with(model, tmp_path) as chat:
        await chat.app.open_conversation(1)
        await chat.answered("more")
        await chat.send("/delete")
        await chat.until(lambda: not files(tmp_path))
    assert not files(tmp_path)  # the engine held it, and did not copy it at the end


async def test_two_chats_share_the_folder(model: Path, tmp_path: Path) -> None:
    async with chat_with(model, tmp_path) as one, chat_with(model, tmp_path) as other:
        await one.answered(QUESTION)
        await other.answered("another " * 300)
        await other.app.open_conversation(one.session.conversation or 0)
        await other.answered("more")
    assert len(files(tmp_path)) == 2
    async with chat_with(model, tmp_path) as chat:
        for conversation in (1, 2):
            await chat.app.open_conversation(conversation)
            assert (await chat.answered("go on"))["from_disk"]


def test_the_settings_have_bounds() -> None:
    for name, value in (("kv_disk", -1), ("kv_disk", float("nan")), ("kv_disk_bits", 5)):
        with pytest.raises(Exception, match=name):
            Settings().changed({name: value})
    assert Settings().parsed("kv_disk", "0.5").kv_disk == 0.5
