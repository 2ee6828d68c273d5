"""What opens over the chat: models, settings, figures; and the commands that need no screen."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_harness import READY, chatting
from gguf_files import write_mistral_gguf
from m7mlx_chat import catalog, jobs
from m7mlx_chat.catalog import Entry, describe, models
from m7mlx_chat.config import Config, read_config
from m7mlx_chat.events import Failed
from m7mlx_chat.screens.model_work import Chosen
from m7mlx_chat.screens.models import Models
from m7mlx_chat.screens.settings import SettingsDrawer
from m7mlx_chat.settings import Settings
from models import small_config, write_folder
from textual.widgets import Button, Input, OptionList, Select, TextArea

from m7mlx.errors import RunError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models in the models folder, and nothing anywhere else."""
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "data" / "models"
    write_folder(folder / "windowed", small_config(vocab_size=32768))
    write_folder(folder / "full", small_config(vocab_size=32768, sliding_window=None))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    return folder


# --- models ---------------------------------------------------------------------------------------


def test_the_models_on_this_machine(here: Path, tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", small_config(vocab_size=32768))
    found = models([str(elsewhere), "no-such", "org/name"], here)
    names = [entry.name.removeprefix(f"{here}/") for entry in found]
    assert names[:3] == ["full", "windowed", str(elsewhere)] and names[-1] == "broken"
    assert {"mistral", "demo"} <= set(names[3:-1])  # what can be had fits this machine
    windowed = found[names.index("windowed")]
    assert (windowed.window, windowed.context, windowed.bits) == (7, 4096, "32 bits")
    stored = (here / "windowed" / "model.safetensors").stat().st_size
    assert 0 < stored - windowed.nbytes < 10_000  # the file's header
    assert windowed.fit == "fits"
    assert found[names.index("full")].window is None
    assert "config.json" in found[names.index("broken")].problem
    assert found[-2].folder is None


def test_whether_a_model_fits(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    entry = describe("windowed", here / "windowed")
    for memory, fit in (
        (entry.memory * 2, "fits"),
        (int(entry.memory * 1.2), "tight"),
        (entry.memory // 2, "too big"),
    ):
        monkeypatch.setattr(catalog, "budget", lambda memory=memory: memory)
        assert entry.fit == fit


async def test_a_model_is_chosen_in_mid_chat(here: Path, tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("one", "first")
        await chat.pilot.press("ctrl+o")
        await chat.settled()
        assert "window 7" in chat.shown() and "mistral" in chat.shown()
        await chat.pilot.press("down", "enter")
        await chat.pilot.pause()
        folder, settings = chat.engine.loaded[-1]
        assert folder == here / "windowed"
        assert settings.model == str(folder)
        assert chat.state() == "loading"
        await chat.say(READY)
        await chat.send("two")
        assert [m["content"] for m in chat.engine.messages()] == ["one", "first", "two"]
        assert chat.store.message(chat.session.line[-1]).model == str(folder)


async def test_the_first_start_offers_what_to_fetch(here: Path, tmp_path: Path) -> None:
    async with chatting(tmp_path, model=None, ready=False) as chat:
        await chat.settled()
        assert isinstance(chat.app.screen, Models)
        assert "Which model?" in chat.shown()
        assert "Mistral-7B-Instruct-v0.3" in chat.shown() and "4.08 GB" in chat.shown()
        assert "SmolLM2-135M-Instruct" in chat.shown()
        await chat.pilot.press("escape")
        assert "Ctrl+O" in chat.status()
        await chat.send("hello")
        assert isinstance(chat.app.screen, Models)  # nobody is there to answer
        assert chat.app.composer.text == "hello"


async def test_a_download_with_progress_that_can_be_stopped(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    go = asyncio.Event()

    async def fetch(name: str, progress: Any) -> Path:
        started.append(name)
        progress(40, 100, "")
        await go.wait()
        return here / "full"

    monkeypatch.setattr(jobs, "fetch", fetch)
    async with chatting(tmp_path, model=None, ready=False, settings=Settings(model="org/name"), fetch=True) as chat:
        await chat.pilot.pause()
        assert started == ["org/name"]
        assert "40%" in chat.shown()
        await chat.pilot.press("escape")
        await chat.pilot.pause()
        assert "goes on from there" in chat.told()
        chat.app.screen.query_one(Input).value = "org/name"
        go.set()
        chat.app.screen.query_one("#use", Button).press()
        await chat.settled()
        assert started == ["org/name"] * 2
        assert chat.engine.loaded[-1][0] == here / "full"
        assert chat.session.settings.model == "org/name"


async def test_a_conversion_and_its_failure(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int | None]] = []

    async def convert(source: str, bits: int | None, into: Path, progress: Any) -> Path:
        assert into == here
        asked.append((source, bits))
        if len(asked) == 1:
            raise RunError("no [room]")
        progress(1, 2, "Converting")
        return here / "full"

    monkeypatch.setattr(jobs, "convert", convert)
    async with chatting(tmp_path) as chat:
        await chat.pilot.press("ctrl+o")
        await chat.settled()
        button = chat.app.screen.query_one("#convert", Button)
        button.press()
        await chat.pilot.pause()
        assert "name what to convert" in chat.told()
        chat.app.screen.query_one(Input).value = "some.gguf"
        chat.app.screen.query_one(Select).value = 0
        button.press()
        await chat.settled()
        assert chat.told() == "✗ no [room]"
        chat.app.screen.query_one(Select).value = 8
        button.press()
        await chat.settled()
        assert asked == [("some.gguf", None), ("some.gguf", 8)]
        assert chat.session.settings.model == str(here / "full")


@pytest.mark.parametrize(
    ("name", "answer"),
    [("/no/such/folder", "there is no folder"), ("x.gguf", "no folder here"), ("{empty}", "no config.json")],
)
async def test_names_that_cannot_be(here: Path, tmp_path: Path, name: str, answer: str) -> None:
    (tmp_path / "empty").mkdir()
    async with chatting(tmp_path) as chat:
        await chat.send(f"/model {name.format(empty=tmp_path / 'empty')}")
        await chat.settled()
        assert answer in chat.told()


async def test_a_gguf_file_is_converted_and_answers(here: Path, tmp_path: Path) -> None:
    """As `--model` gives it at the start, and as it is chosen later."""
    file = tmp_path / "tiny.gguf"
    write_mistral_gguf(file, small_config(vocab_size=32000, n_layers=1))
    async with chatting(tmp_path, model=None, ready=False, settings=Settings(model=str(file)), fetch=True) as chat:
        await chat.settled()
        (folder, settings) = chat.engine.loaded[-1]
        assert describe("x", folder).problem == ""
        assert folder.parent == tmp_path / "cache" / "gguf"
        assert settings.model == str(file)
        await chat.send(f"/model {file}")
        await chat.settled()
        assert chat.engine.loaded[-1][0] == folder


async def test_a_gguf_file_on_the_hub_is_fetched(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(name: str, progress: Any) -> Path:
        assert name == "org/name/tiny.gguf"
        return here / "full"

    monkeypatch.setattr(jobs, "fetch", fetch)
    async with chatting(tmp_path) as chat:
        await chat.send("/model org/name/tiny.gguf")
        await chat.settled()
        assert chat.engine.loaded[-1][0] == here / "full"


async def test_a_real_conversion_in_a_process_of_its_own(here: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    source = write_folder(tmp_path / "source", small_config(vocab_size=32768))
    folder = await jobs.convert(str(source), None, here, lambda *event: seen.append(event))
    assert folder == here / "source"
    assert describe("x", folder).problem == ""
    assert seen[-1][0] == seen[-1][1]
    with pytest.raises(RunError, match="exists"):
        await jobs.convert(str(source), None, here, lambda *event: None)
    with pytest.raises(RunError, match="do not divide"):
        await jobs.convert(str(source), 4, here, lambda *event: None)
    assert await jobs.fetch(str(source), lambda *event: None) == source
    with pytest.raises(RunError, match="no alias"):
        await jobs.fetch("nonsense", lambda *event: None)


async def test_work_that_is_cancelled_ends_its_process(tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    event = "{'event': 'progress', 'done': os.getpid(), 'total': 1}"
    program.write_text(f"import json, os, time\nprint(json.dumps({event}), flush=True)\ntime.sleep(60)\n")
    pids: list[int] = []
    job = asyncio.create_task(jobs._run([sys.executable, str(program)], lambda done, *_: pids.append(done)))
    while not pids:
        await asyncio.sleep(0.01)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert not Path(f"/proc/{pids[0]}").exists() or not Path("/proc").exists()


# --- settings -------------------------------------------------------------------------------------


async def test_settings_count_for_the_conversation_and_are_kept_with_it(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("one", "first")
        await chat.pilot.press("f2")
        drawer = chat.app.screen
        assert isinstance(drawer, SettingsDrawer)
        drawer.query_one("#field-temperature", Input).value = "0.7"
        drawer.query_one("#field-temperature", Input).focus()
        await chat.pilot.press("enter")
        drawer.query_one("#field-top_k", Input).value = "many"
        drawer.query_one("#field-top_k", Input).focus()
        await chat.pilot.press("enter")
        assert "top_k must be a whole number" in chat.shown()
        assert drawer.query_one("#field-top_k", Input).value == "0"
        drawer.query_one("#field-system", TextArea).load_text("Be brief")
        drawer.query_one("#field-system", TextArea).focus()
        await chat.pilot.press("tab", "escape")  # leaving the field is enough
        await chat.send("two")
        request = chat.engine.asked[-1]
        assert request.sampling.temperature == 0.7
        assert request.prompt[0] == {"role": "system", "content": "Be brief"}
        conversation = chat.session.conversation
        await chat.app.action_new()
        assert chat.session.settings.temperature == 0
        await chat.app.open_conversation(conversation or 0)
        assert (chat.session.settings.temperature, chat.session.settings.system) == (0.7, "Be brief")


async def test_the_drawer_takes_what_is_typed_or_says_why_not(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(80, 24)) as chat:
        await chat.pilot.press("f2")
        await chat.pilot.pause()
        await chat.pilot.press(*"Two", "enter", *"lines")  # the first field has the focus
        for _ in range(7):
            await chat.pilot.press("tab")
        field = chat.app.screen.query_one("#field-max_tokens", Input)
        assert field.has_focus
        await chat.pilot.press(*"many", "escape")
        await chat.pilot.pause()
        assert isinstance(chat.app.screen, SettingsDrawer)  # it stays, and says why, in sight
        assert "max_tokens must be a whole number" in chat.shown()
        await chat.pilot.press("home", "1", "escape")
        await chat.pilot.pause()
        assert len(chat.app.screen_stack) == 1
        assert (chat.session.settings.max_tokens, chat.session.settings.system) == (14096, "Two\nlines")


async def test_presets(tmp_path: Path) -> None:
    config = Config(tmp_path / "config.toml")
    async with chatting(tmp_path, config=config) as chat:
        await chat.send("/set temperature 0.9")
        await chat.pilot.press("f2")
        chat.app.screen.query_one("#keep", Input).value = "wild"
        chat.app.screen.query_one("#keep", Input).focus()
        await chat.pilot.press("enter", "escape")
        assert read_config(config.path).presets == {"wild": {"temperature": 0.9}}
        await chat.send("/set temperature 0")
        await chat.send("/preset wild")
        assert chat.session.settings.temperature == 0.9
        await chat.send("/preset tame")
        assert "there is no preset 'tame'" in chat.notices()
        await chat.send("/set temperature 0")
        await chat.pilot.press("f2")
        chat.app.screen.query_one("#preset", Select).value = "wild"
        await chat.pilot.pause()
        await chat.pilot.pause()
        assert chat.session.settings.temperature == 0.9
        assert chat.app.screen.query_one("#field-temperature", Input).value == "0.9"


async def test_what_concerns_the_engine_sets_it_up_anew(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("/set kv_bits 8")
        assert chat.engine.loaded[-1][1].kv_bits == 8
        assert chat.state() == "loading"
        await chat.say(READY)
        await chat.send("/set kv_bits 5")
        assert "kv_bits must be off, 4, 8" in chat.notices()
        await chat.send("/set max_kv_size 9")
        # the engine goes on as it was
        await chat.say(Failed("this model's own window bounds its cache"), READY)
        assert "own window" in chat.notices()
        assert chat.session.settings.max_kv_size is None
        assert chat.state() == "ready"
        await chat.send("/set nonsense 1")
        assert "there is no setting 'nonsense'" in chat.notices()
        await chat.send("/set top_p")
        assert "top_p: 1" in chat.notices()


# --- files and figures ----------------------------------------------------------------------------


async def test_exports_come_in_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with chatting(tmp_path / "data") as chat:
        await chat.send("/export")
        assert "nothing to export" in chat.notices()
        await chat.exchange("What is *this*?", "It is **that**.")
        for command in ("/export", "/export html", "/export my file.json", "/export json my file.json"):
            await chat.send(command)
        assert "my file.json exists" in chat.notices()
        assert "It is **that**." in (tmp_path / "What-is-this.md").read_text()
        assert "<strong>that</strong>" in (tmp_path / "What-is-this.html").read_text()
        assert json.loads((tmp_path / "my file.json").read_text())["format"] == "m7mlx-chat"
        await chat.send("/export")
        assert (tmp_path / "What-is-this-2.md").exists()  # nothing is overwritten
        await chat.send("/import my file.json")
        assert len(chat.store.conversations()) == 2
        assert chat.line() == ["What is *this*?", "It is **that**."]
        await chat.send("/import What-is-this.md")
        assert "not JSON" in chat.notices()
        await chat.send("/import")
        assert "needs a file" in chat.notices()


async def test_the_first_line_shows_the_conversation_and_the_model_of_now(here: Path, tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(130, 30)) as chat:
        await chat.exchange("first", "yes", seen=1234)
        first = chat.session.conversation or 0
        await chat.pilot.press("ctrl+n")
        await chat.pilot.pause()
        top = chat.shown().splitlines()[0]
        assert "first" not in top and " 0/4,096" in top
        await chat.exchange("second", "yes", seen=99)
        assert " 99/4,096" in chat.shown().splitlines()[0]
        await chat.app.open_conversation(first)
        top = chat.shown().splitlines()[0]
        assert "first" in top and " 1,234/4,096" in top
        await chat.app.model_chosen(Chosen("/a/long/path/own-4bit", Path("/a/long/path/own-4bit")))
        await chat.pilot.pause()
        top = chat.shown().splitlines()[0]
        assert "own-4bit · first" in top and "/a/long" not in top and "4,096" not in top


async def test_figures(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("/stats")
        assert "Nothing has been answered yet" in chat.shown()
        await chat.pilot.press("escape")
        await chat.exchange("one", "first answer", reused_tokens=1234, prompt_tps=567.0, peak_memory=4_500_000_000)
        await chat.pilot.press("f4")
        for text in ("first answer", "21.5", "0.30 s", "1,234", "567", "4.50 GB"):
            assert text in chat.shown()


async def test_themes_are_kept(tmp_path: Path) -> None:
    config = Config(tmp_path / "config.toml")
    async with chatting(tmp_path, config=config) as chat:
        await chat.send("/theme nord")
        assert chat.app.theme == "nord"
        assert read_config(config.path).theme == "nord"
        await chat.send("/theme nonsense")
        assert "there is no theme 'nonsense'" in chat.notices()
        await chat.send("/theme")
        await chat.pilot.pause()
        assert len(chat.app.screen_stack) == 2
        await chat.pilot.press("escape")
    async with chatting(tmp_path, config=Config(config.path, theme="gone")) as chat:
        assert "names a theme that is not there" in chat.notices()


async def test_the_list_of_models_is_what_the_screen_shows(here: Path, tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.pilot.press("ctrl+o")
        await chat.settled()
        options = chat.app.screen.query_one(OptionList)
        assert options.option_count == len(models(own=here))
        assert isinstance(models(own=here)[0], Entry)
