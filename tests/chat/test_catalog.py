"""Names and settings from elsewhere: from an import, a stray folder, an older file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_harness import READY, chatting, environment_in
from m7mlx_chat import catalog, cli, launch
from m7mlx_chat.catalog import models, on_this_machine, shown_name
from m7mlx_chat.choice import choose_model
from m7mlx_chat.config import Config
from m7mlx_chat.environment import read_environment
from m7mlx_chat.screens.models import Models
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import Store
from m7mlx_chat.view import Parts

from m7mlx.files.hub import ALIASES

# What Hub repositories, folders and settings cannot be called, or not everywhere.
NAMES = (
    "a/b.git",
    "a--b/c",
    "a/b..c",
    "-a/b",
    "x" * 5000,
    "a/" + "b" * 200,
    "\0",
    "a\0/b",
    "\udcff",
    "\x1b[2J",
    "~nobody/x",
    "",
    " ",
    "/",
    "//",
    ".",
    "..",
    "/dev/null",
    "/root/../proc/1/root/x",
    "--help",
    "gpt-4o",
    "Ünïcode/Möd€l",
)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("M7MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for stray in (
        "models--a--b--backup",
        "models--a--b.git",
        "models--a",
        "models--..--x",
        "models--a--" + "b" * 200,
    ):
        (tmp_path / "hub" / stray).mkdir(parents=True)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:12]))
async def test_any_name_can_be_given_to_the_picker_and_to_the_commands(tmp_path: Path, name: str) -> None:
    on_this_machine(name)  # raises nothing
    async with chatting(tmp_path) as chat:
        await chat.exchange("question", "answer")
        before = chat.session.settings.model
        chat.app.choose_model(name)
        await chat.settled()
        assert isinstance(chat.app.screen, Models)
        chat.app.screen._take(name)
        await chat.settled()
        assert chat.told()
        assert len(chat.told()) <= 500
        while len(chat.app.screen_stack) > 1:
            await chat.pilot.press("escape")
            await chat.pilot.pause(0.05)
        with chat.app.going_on():
            await chat.app.run_command(f"/set model {name}")
        await chat.settled()
        assert chat.session.settings.model == before  # until it is one
        assert chat.store.conversations()[0].model == before
    assert len(models(list(NAMES), tmp_path)) >= 2


async def test_the_names_that_are_shown_can_be_typed(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that was converted here, an alias and a repository in the Hub's cache, a path."""
    environment, hub = environment_in(tmp_path), tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    long = "some-org/A-Model-With-a-Long-Name-2506-Instruct-4bit"
    for repo in (ALIASES["mistral"], long):
        storage = hub / f"models--{repo.replace('/', '--')}"
        (storage / "refs").mkdir(parents=True)
        (storage / "refs" / "main").write_text("0" * 40)
        shutil.copytree(model_folder, storage / "snapshots" / ("0" * 40))
    shutil.copytree(model_folder, environment.models / "mine-4bit")
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    wanted = ["mine-4bit", "mistral", long, str(tmp_path / "elsewhere")]
    entries = [one for one in models([wanted[-1]], environment.models) if one.folder is not None]
    entries = [one for one in entries if one.name != "demo"]
    assert sorted(shown_name(one, environment.models) for one in entries) == sorted(wanted)
    async with chatting(tmp_path, environment=environment, size=(140, 40)) as chat:
        chat.app.choose_model()
        await chat.settled()
        assert all(name in chat.shown() for name in wanted[:3])
        await chat.pilot.press("escape")
        for entry in entries:
            name = shown_name(entry, environment.models)
            chosen = choose_model(name, Config(environment.config), tmp_path / "none.db", environment.models)
            assert chosen.is_wanted and on_this_machine(chosen.model) == entry.folder
            configured = Config(environment.config, {"model": name})
            assert choose_model(None, configured, tmp_path / "none.db", environment.models) == chosen
            await chat.send(f"/model {name}")
            await chat.settled()
            assert chat.engine.loaded[-1] == (entry.folder, chat.session.settings)
            assert chat.session.settings.model == chosen.model
            await chat.say(READY)


async def test_a_conversation_that_names_no_model_is_opened(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        asked = chat.store.ask(None, None, "q", model="a/b.git", settings={"temperature": "hot", "top_k": -1, "x": 1})
        chat.store.configure(asked.conversation, model="a/b.git", system="", settings={"stop": [""], "seed": 1.5})
        chat.store.finish(asked.answer, "complete", "a")
        await chat.app.open_conversation(asked.conversation)
        assert chat.session.settings == Settings(model=chat.session.settings.model)
        await chat.exchange("goes on", "indeed")
        assert chat.line() == ["q", "a", "goes on", "indeed"]


def test_the_picker_offers_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "budget", lambda: 8_000_000_000)
    offered = {entry.name: entry for entry in models()}
    assert {"demo", "ministral-3b", "mistral", "ministral-8b"} <= offered.keys()
    assert not {"mistral-small", "devstral-small", "ministral-14b"} & offered.keys()
    assert "tools" in offered["ministral-3b"].about and "reasoning" not in offered["ministral-8b"].about
    assert "reasoning" in offered["ministral-8b-reasoning"].about
    assert offered["ministral-8b"].context == 262_144
    sizes = [entry.nbytes for entry in offered.values()]
    assert sizes == sorted(sizes)


class _Shown(Exception):
    pass


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the app was begun with; it does not come up."""
    found: dict[str, Any] = {}

    def remember(parts: Parts, **options: Any) -> None:
        found.update(options, settings=parts.session.settings)
        raise _Shown

    monkeypatch.setattr(launch, "ChatApp", remember)
    monkeypatch.setenv("TEXTUAL_DRIVER", "of a browser")  # as good as a terminal
    return found


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.strip("/. ") and name != "\udcff"], ids=lambda name: repr(name[:12])
)
def test_the_chat_starts_whatever_model_was_the_last(shown: dict[str, Any], name: str) -> None:
    with Store(read_environment().database) as store:
        store.ask(None, None, "q", model=name)
    with pytest.raises(_Shown):
        cli.main([])
    assert shown["settings"].model == "mistral"
    assert shown["folder"] is None
    (note,) = shown["notes"]
    # far longer ones are cut
    assert note.startswith(f"the model of the last conversation is not here: {name[:900]}")


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ('model = "no-such"', "names a model that is not there: no-such"),
        ("temperature = 'hot'", "temperature must be a number"),
        ("temperature = -1", "temperature"),
        ("nonsense = 1", "there is no setting 'nonsense'"),
        ("[presets]\na = 1", "presets are tables"),
        ("model = [", "cannot be read"),
        ("[keys]\nnew = 5", "keys are texts"),
    ],
)
def test_the_chat_starts_whatever_the_file_says(
    shown: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    note: str,
) -> None:
    monkeypatch.setenv("M7MLX_CONFIG", str(tmp_path))
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(_Shown):
        cli.main([])
    assert [note in told for told in shown["notes"]] == [True]


async def test_what_went_wrong_before_is_told(tmp_path: Path) -> None:
    async with chatting(tmp_path, model=None, notes=["config.toml is odd"]) as chat:
        assert "config.toml is odd" in chat.notices()
        assert isinstance(chat.app.screen, Models)


@pytest.mark.parametrize("name", ["org/name/tiny.gguf", "{here}/tiny.gguf"])
def test_a_gguf_file_can_be_had(shown: dict[str, Any], tmp_path: Path, name: str) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    name = name.format(here=tmp_path)
    with pytest.raises(_Shown):
        cli.main(["--model", name])
    assert (shown["settings"].model, shown["folder"], shown["fetch"], shown["notes"]) == (name, None, True, [])
