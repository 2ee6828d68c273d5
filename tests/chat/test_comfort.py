"""Small things that people expect: keys, names and texts as they are elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_harness import chatting, environment_in
from m7mlx_chat import jobs
from m7mlx_chat.config import Config, read_config
from m7mlx_chat.events import Done, Event, Seen, Text
from m7mlx_chat.loaded import LoadedModel
from m7mlx_chat.widgets.messages import Question
from models import small_config, write_folder

from m7mlx import Piece
from m7mlx.answer_reader import AnswerReader
from m7mlx.errors import RunError


async def test_a_long_question_is_folded(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("\n".join(f"line {i}" for i in range(1, 41)), "yes")
        await chat.exchange("short", "yes")
        long, short = chat.app.query(Question)
        assert "40 lines · t shows all" in chat.shown() and "line 40" not in chat.shown()
        assert not short.has_class("-long")
        await chat.pilot.press(*["alt+up"] * 4, "t")
        await chat.pilot.press("ctrl+home")
        await chat.pilot.pause()
        assert "line 15" in chat.shown()
        await chat.pilot.press("t")
        await chat.pilot.pause()
        assert long.region.height < 15
        await chat.pilot.click(".more")
        await chat.pilot.pause()
        assert long.region.height > 40
        await chat.pilot.press("ctrl+end")
        await chat.pilot.pause()
        assert chat.app.transcript.scroll_y == chat.app.transcript.max_scroll_y


@pytest.mark.parametrize("cluster", ["👩‍👩‍👧", "🇫🇷", "é", "한", "👍🏽", "\u0928\u093f"])
async def test_what_looks_like_one_character_is_one(tmp_path: Path, cluster: str) -> None:
    async with chatting(tmp_path) as chat:
        chat.app.composer.insert(f"a{cluster}b")
        await chat.pilot.press("left", "backspace")
        assert chat.app.composer.text == "ab"
        chat.app.composer.insert(cluster)
        await chat.pilot.press("left", "delete", "right", "x")
        assert chat.app.composer.text == "abx"


async def test_commands_of_other_names_and_colours_from_the_palette(tmp_path: Path) -> None:
    config = Config(tmp_path / "config.toml")
    async with chatting(tmp_path, config=config) as chat:
        await chat.exchange("question", "answer")
        await chat.send("/clear")
        assert chat.session.line == []
        chat.app.theme = "nord"  # as the palette does
        await chat.pilot.pause()
        assert read_config(config.path).theme == "nord"
        await chat.send("/quit")
        assert not chat.app.is_running


async def test_a_model_of_ones_own_is_known_by_the_name_that_is_shown(tmp_path: Path) -> None:
    environment = environment_in(tmp_path)
    environment.models.mkdir(parents=True)
    write_folder(environment.models / "mine-4bit", small_config())
    async with chatting(tmp_path, environment=environment) as chat:
        await chat.send("/model mine-4bit")
        await chat.settled()
        assert chat.engine.loaded[-1][0] == environment.models / "mine-4bit"
        assert "mine-4bit" in chat.shown().splitlines()[0]


def test_an_answer_that_is_cut_within_a_character_ends_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = object.__new__(LoadedModel)
    monkeypatch.setattr(loaded, "tokenizer", SimpleNamespace(eos_ids=(2,)), raising=False)
    monkeypatch.setattr(loaded, "_seen", lambda: Seen(0, 0))
    events: list[Event] = []
    pieces = [Piece(text="ok ", ids=[5]), Piece(text="\ufffd\ufffd", ids=[6], finish_reason="length")]
    monkeypatch.setattr(loaded, "_emit", events.append, raising=False)
    ended = loaded._tell(iter(pieces), AnswerReader(loaded.tokenizer, "none"))
    assert isinstance(ended, Done)
    assert (ended.text, ended.ids, ended.reason) == ("ok ", [5, 6], "length")
    assert "".join(event.text for event in events if isinstance(event, Text)) == "ok "


async def test_what_pip_said_is_told() -> None:
    program = "import sys; print('ERROR: no network', file=sys.stderr); sys.exit(3)"
    with pytest.raises(RunError, match="no network"):
        await jobs._run([sys.executable, "-c", program], lambda done, total, task: None)
