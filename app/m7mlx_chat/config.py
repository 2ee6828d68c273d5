"""The user's own file, config.toml: defaults, presets, theme, keys.

Written only where the user asks for it.

model = "mistral"
max_memory = 12
no_save = false
temperature = 0.7
theme = "nord"

[presets.precise]
temperature = 0
system = "Answer in one sentence."

[keys]
new = "ctrl+t"

[tools.files]
command = ["npx", "-y", "@modelcontextprotocol/server-filesystem", "/home/me/notes"]
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m7mlx.errors import InputError
from m7mlx.files.disk import write_whole
from m7mlx_chat.servers import ROUNDS, Server, read_servers
from m7mlx_chat.settings import FIELDS, Settings

_TABLES = ("presets", "keys", "tools")
# what is true or false, and which of it where the file does not say
_SWITCHES = {"no_save": False, "bell": True, "terminal_title": True, "model_titles": True}
_MOST_ROUNDS = 100


@dataclass(frozen=True)
class Config:
    """What the file says.

    values          settings
    presets         settings under a name
    keys            action → keys
    max_memory      bytes, as --max-memory
    no_save         keep nothing, as --no-save
    servers         servers of tools
    tool_rounds     how often the model may call tools in one answer
    bell            ring when an answer has ended that nobody was looking at
    terminal_title  have the terminal's title tell the conversation
    model_titles    have the model write titles when nothing else is asked for
    """

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    theme: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    max_memory: int | None = None
    no_save: bool = False
    servers: tuple[Server, ...] = ()
    tool_rounds: int = ROUNDS
    bell: bool = True
    terminal_title: bool = True
    model_titles: bool = True

    @property
    def prompts(self) -> Path:
        """The folder of the user's own prompts, beside the file."""
        return self.path.parent / "prompts"

    def settings(self, preset: str | None = None) -> Settings:
        """The defaults, with the file's values and those of a preset.

        Raises InputError if there is no such.
        """
        settings = Settings().changed(self.values)
        return settings if preset is None else settings.changed(self.preset(preset))

    def preset(self, name: str) -> dict[str, Any]:
        if name not in self.presets:
            there = ", ".join(self.presets) or "none yet"
            raise InputError(f"there is no preset {name!r} in {self.path}; there are: {there}")
        return self.presets[name]


def read_config(path: Path) -> Config:
    """Read the file, if there is one.

    Raises InputError, which names it, for whatever is wrong in it.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Config(path)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); mend it or move it away") from None
    try:
        return _checked(path, data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _checked(path: Path, data: dict[str, Any]) -> Config:
    presets, keys, theme = data.pop("presets", {}), data.pop("keys", {}), data.pop("theme", "")
    if not isinstance(presets, dict) or not all(isinstance(values, dict) for values in presets.values()):
        raise InputError("presets are tables: [presets.name]")
    if not isinstance(keys, dict) or not all(isinstance(value, str) for value in keys.values()):
        raise InputError('keys are texts: new = "ctrl+t"')
    if not isinstance(theme, str):
        raise InputError('theme is a name: theme = "nord"')
    most, switches = data.pop("max_memory", None), {name: data.pop(name, is_on) for name, is_on in _SWITCHES.items()}
    for name, is_on in switches.items():
        if not isinstance(is_on, bool):
            raise InputError(f"{name} is true or false")
    servers, rounds = read_servers(data.pop("tools", {})), data.pop("tool_rounds", ROUNDS)
    if type(rounds) is not int or not 1 <= rounds <= _MOST_ROUNDS:
        raise InputError(f"tool_rounds is a whole number from 1 to {_MOST_ROUNDS}")
    settings = Settings().changed(data)
    for name, values in presets.items():
        try:
            settings.changed(values)
        except InputError as error:
            raise InputError(f"preset {name}: {error}") from None
    limit = None if most is None else _bytes(most)
    return Config(path, data, presets, theme, keys, limit, servers=servers, tool_rounds=rounds, **switches)


def _bytes(gigabytes: object) -> int:
    if type(gigabytes) not in (int, float) or not 0 < gigabytes < 1e6:  # type: ignore[operator]
        raise InputError("max_memory is a number of gigabytes: max_memory = 12")
    return round(gigabytes * 1e9)  # type: ignore[operator]


def save(path: Path, changes: Mapping[str, Any]) -> None:
    """Change top-level entries of the file, or make it; None removes one.

    Comments and order stay.
    """
    _edit(path, (), changes)


def save_preset(path: Path, name: str, values: Mapping[str, Any] | None) -> None:
    """Write a preset anew; None removes it."""
    _edit(path, ("presets",), {name: dict(values) if values is not None else None})


def _edit(path: Path, table: tuple[str, ...], changes: Mapping[str, Any]) -> None:
    import tomlkit  # 30 ms, and only whoever keeps something needs it
    from tomlkit.exceptions import TOMLKitError

    unknown = [name for name in changes if not table and name not in (*FIELDS, *_TABLES, "theme")]
    assert not unknown, unknown
    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8")) if path.exists() else tomlkit.document()
        place: Any = document
        for name in table:
            place = place.setdefault(name, tomlkit.table(is_super_table=True))
        for name, value in changes.items():
            if value is None:
                place.pop(name, None)
            else:
                place[name] = value
        text = tomlkit.dumps(document)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        raise InputError(f"{path} cannot be written ({error}); mend it or move it away") from None
