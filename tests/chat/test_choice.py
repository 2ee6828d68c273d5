"""Which model answers: an option, a conversation, config.toml or the default; one rule for all."""

from __future__ import annotations

from pathlib import Path

import pytest
from m7mlx_chat.catalog import SUGGESTED
from m7mlx_chat.choice import Choice, choose_model
from m7mlx_chat.config import Config
from m7mlx_chat.headless import fetch_models
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import Store

from m7mlx.errors import DownloadError, InputError
from m7mlx.units import in_gigabytes


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Conversations with a model that is here, then with others."""
    (tmp_path / "here").mkdir()
    path = tmp_path / "data" / "chats.db"
    with Store(path) as store:
        for model in (str(tmp_path / "here"), "gone/model", ""):
            store.ask(None, None, "question", model=model)
    return path


def test_the_rule(tmp_path: Path, database: Path) -> None:
    config = Config(tmp_path / "config.toml", {"model": "org/configured"})
    nothing = tmp_path / "nothing.db"
    here = str(tmp_path / "here")
    gone = "the model of the last conversation is not here: gone/model"
    assert choose_model("org/named", config, database) == Choice("org/named", True)
    assert choose_model(None, config, database) == Choice(here, True, (gone,))
    assert choose_model(None, config, nothing) == Choice("org/configured", True)
    assert choose_model(None, Config(config.path), nothing) == Choice(Settings().model, False)
    assert not nothing.exists()
    (tmp_path / "here").rmdir()
    assert choose_model(None, config, database) == Choice("org/configured", True, (gone,))
    wrong = Config(config.path, {"model": "org/x.git"})
    (note,) = choose_model(None, wrong, nothing).notes
    assert "names a model that is not there" in note
    with pytest.raises(InputError):
        choose_model("org/x.git", config, database)
    nothing.write_bytes(b"no database at all")
    assert choose_model(None, config, nothing) == Choice("org/configured", True)


def test_a_download_is_told_before_it_begins(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[str] = []

    def resolve(name: str, progress: object = None) -> Path:
        told.append(capsys.readouterr().err)
        raise DownloadError("cannot reach the Hub")

    monkeypatch.setattr("m7mlx_chat.headless.resolve", resolve)
    monkeypatch.setattr("m7mlx_chat.headless.on_this_machine", lambda name: None)
    (size,) = (in_gigabytes(entry.nbytes) for entry in SUGGESTED if entry.name == "mistral")
    for model, words in (("mistral", f"it is fetched now ({size})"), ("org/name", "it is fetched now;")):
        with pytest.raises(DownloadError):
            fetch_models(Settings(model=model))
        assert f"{model} is not on this machine" in told[-1] and words in told[-1]
    monkeypatch.setattr("m7mlx_chat.headless.on_this_machine", lambda name: tmp_path)
    with pytest.raises(DownloadError):
        fetch_models(Settings(model="mistral"))
    assert told[-1] == ""
