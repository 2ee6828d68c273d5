"""One list of settings: typed, read from TOML and JSON, kept in a file whose comments stay."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from m7mlx_chat.actions import ACTIONS, bindings, key_name, unknown_keys
from m7mlx_chat.config import read_config, save, save_preset
from m7mlx_chat.environment import read_environment
from m7mlx_chat.settings import ANSWER, FIELDS, Settings, known
from textual.binding import Binding

from m7mlx.errors import InputError

values = st.fixed_dictionaries(
    {},
    optional={
        "model": st.text(min_size=1).map(str.strip),
        "system": st.text().map(str.strip),
        "temperature": st.floats(0, 100),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(0, 1000),
        "seed": st.none() | st.integers(0, 2**32),
        "max_tokens": st.integers(1, 10**6),
        "stop": st.lists(st.text("abc[]", min_size=1), max_size=3),
        "speculate": st.sampled_from(["off", "lookup", "org/name"]),
        "kv_bits": st.sampled_from([None, 4, 8, 16, 32]),
        "max_kv_size": st.none() | st.integers(1, 10**6),
    },
)


@given(values)
def test_what_is_given_is_all_there_is(changes: dict[str, Any]) -> None:
    settings = Settings().changed(changes)
    assert Settings().changed(settings.given(FIELDS)) == settings
    assert Settings().changed(known(settings.given(FIELDS), FIELDS)) == settings


@given(values)
def test_what_is_shown_can_be_typed(changes: dict[str, Any]) -> None:
    settings = Settings().changed(changes)
    for name in FIELDS:
        shown = Settings().parsed(name, settings.shown(name))
        value, back = getattr(settings, name), getattr(shown, name)
        assert back == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temperature", "warm", "temperature must be a number, not 'warm'"),
        ("temperature", "-1", "temperature must lie between"),
        ("temperature", "nan", "temperature must lie between"),
        ("top_k", "1.5", "top_k must be a whole number"),
        ("kv_bits", "5", "kv_bits must be off, 4, 8, 16, 32, not 5"),
        ("max_tokens", "0", "max_tokens must be at least 1"),
        ("max_tokens", "off", "max_tokens must be a whole number"),
        ("max_kv_size", "-3", "max_kv_size must be at least 1"),
        ("colour", "red", "there is no setting 'colour'; there are model, system"),
    ],
)
def test_what_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", "\\(")):
        Settings().parsed(name, text)


def test_off_unsets() -> None:
    settings = Settings(seed=1, kv_bits=8, stop=("x",))
    assert settings.parsed("seed", "off").seed is None
    assert settings.parsed("kv_bits", " OFF ").kv_bits is None
    assert settings.parsed("stop", "").stop == ()
    assert settings.parsed("stop", "a, b").stop == ("a", "b")


def test_settings_of_another_version_do_not_hurt() -> None:
    stored = {"temperature": 0.5, "gone": 1, "top_k": "many", "kv_bits": 4}
    assert known(stored, ANSWER) == {"temperature": 0.5}


# --- the file -------------------------------------------------------------------------------------


def test_the_file_and_its_presets(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        'model = "demo"\ntemperature = 1\ntheme = "nord"\n'
        '[presets.precise]\ntemperature = 0\nseed = "off"\nstop = ["x"]\n[keys]\nnew = "ctrl+t"\n'
    )
    config = read_config(path)
    assert config.settings() == Settings(model="demo", temperature=1.0)
    assert config.settings("precise") == Settings(model="demo", stop=("x",))
    assert (config.theme, config.keys) == ("nord", {"new": "ctrl+t"})
    with pytest.raises(InputError, match=r"there is no preset 'wild'.*there are: precise"):
        config.settings("wild")
    assert read_config(tmp_path / "nothing.toml").settings() == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "cannot be read"),
        ("\xff", "cannot be read"),
        ("nonsense = 1", "there is no setting 'nonsense'"),
        ("temperature = true", "temperature must be a number"),
        ("top_k = 1.0", "top_k must be a whole number"),
        ("presets = 1", "presets are tables"),
        ("[presets]\nx = 1", "presets are tables"),
        ("[presets.x]\ntop_p = 2", "preset x: top_p must lie"),
        ("[keys]\nnew = 1", "keys are texts"),
        ("theme = 1", "theme is a name"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        read_config(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_saving_keeps_comments_and_all_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "config.toml"
    save(path, {"theme": "nord"})
    path.write_text('# mine\ntemperature = 0.5  # warm\n\n[presets.a]\ntop_k = 3\n\n[keys]\nnew = "ctrl+t"\n')
    save(path, {"theme": "dracula", "model": "demo"})
    save_preset(path, "b c", {"stop": ["x"], "system": 'say "hi"\nand go'})
    text = path.read_text()
    assert "# mine" in text and "# warm" in text
    config = read_config(path)
    assert (config.theme, config.values) == ("dracula", {"temperature": 0.5, "model": "demo"})
    assert config.presets == {"a": {"top_k": 3}, "b c": {"stop": ["x"], "system": 'say "hi"\nand go'}}
    save_preset(path, "a", None)
    save(path, {"model": None})
    assert list(read_config(path).presets) == ["b c"]
    assert "model" not in tomllib.loads(path.read_text())
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.toml"]
    path.write_text("broken = ")
    with pytest.raises(InputError, match="cannot be written"):
        save(path, {"theme": "nord"})
    assert path.read_text() == "broken = "


def test_what_is_no_setting_of_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("max_memory = 1.5\nno_save = true\n")
    config = read_config(path)
    assert (config.max_memory, config.no_save, config.values) == (1_500_000_000, True, {})
    assert config.bell and config.terminal_title
    path.write_text("bell = false\nterminal_title = false\n")
    assert not (read_config(path).bell or read_config(path).terminal_title)
    for line, said in (
        ("max_memory = 'x'", "gigabytes"),
        ("max_memory = 0", "gigabytes"),
        ("no_save = 1", "true"),
        ("bell = 'no'", "bell is true or false"),
    ):
        path.write_text(line)
        with pytest.raises(InputError, match=said):
            read_config(path)


def test_where_the_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M7MLX_CONFIG", str(tmp_path))
    assert read_environment().config == tmp_path / "config.toml"
    monkeypatch.delenv("M7MLX_CONFIG")
    assert read_environment().config.parts[-2:] == ("m7mlx", "config.toml")


# --- the registry of actions ----------------------------------------------------------------------


def test_keys_and_commands_are_given_once() -> None:
    for place in ("app", "message", "sidebar"):
        found = [b for b in bindings(place) if isinstance(b, Binding)]
        keys = [key for binding in found for key in binding.key.split(",")]
        assert len(keys) == len(set(keys)), place
        assert all(binding.id and binding.tooltip for binding in found)
    names = [key_name(action) for action in ACTIONS]
    assert len(names) == len(set(names))
    commands = [action.slash for action in ACTIONS if action.slash]
    assert len(commands) == len(set(commands))
    assert unknown_keys({"new": "x", "select_previous": "x", "message_copy_code": "y", "select(-1)": "z"}) == [
        "select(-1)"
    ]
