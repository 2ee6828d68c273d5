"""The settings that answers are made with: one list for command line, file, /set and store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from m7mlx.cache import CacheOptions
from m7mlx.command import KV_BITS, KV_BITS_HELP
from m7mlx.errors import InputError
from m7mlx.memory import UNDO_SLACK
from m7mlx.sampling import Sampling

Kind = Literal["text", "number", "whole", "texts"]


class Field(NamedTuple):
    """What a setting is for and which values it takes; `optional`: may be unset, shown as "off"."""

    kind: Kind
    help: str
    optional: bool = False
    choices: tuple[Any, ...] = ()


# What an answer is made with: stored with it, and with the conversation.
ANSWER: dict[str, Field] = {
    "system": Field("text", "system prompt: how the model should behave"),
    "temperature": Field("number", "randomness; 0: the likeliest token, always"),
    "top_p": Field("number", "keep the likeliest tokens up to this probability; 1: all"),
    "top_k": Field("whole", "keep this many of the likeliest tokens; 0: all"),
    "min_p": Field("number", "keep tokens this many times as likely as the likeliest; 0: all"),
    "repetition_penalty": Field("number", "above 1: repeat less"),
    "seed": Field("whole", "the same seed gives the same answer; off: a new one each time", optional=True),
    "max_tokens": Field("whole", "longest answer, in tokens"),
    "reasoning_effort": Field("text", "how much to think, for models that can be told: none, high …", optional=True),
    "stop": Field("texts", "texts that end the answer, separated by commas"),
}
# What the engine is set up with; a change starts a new cache.
ENGINE: dict[str, Field] = {
    "speculate": Field("text", "the same answer, sooner: lookup, or a small model of the same family; off"),
    "kv_bits": Field("whole", KV_BITS_HELP, optional=True, choices=(None, *KV_BITS)),
    "kv_group_size": Field("whole", "in 4 or 8 bits: in groups of 32, 64 or 128", choices=(32, 64, 128)),
    "max_kv_size": Field("whole", "models without a window: keep so many tokens, and go on for ever", optional=True),
    "kv_disk": Field(
        "number", "conversations on the disk, to go on at once when opened again: up to so many GB; 0: none"
    ),
    "kv_disk_bits": Field("whole", "in so many bits there; 16 and 32 change no answer", choices=KV_BITS),
}
FIELDS = {"model": Field("text", "folder, Hub repository (org/name) or alias"), **ANSWER, **ENGINE}
_OFF = ("off", "none", "")
_WANTED = {"text": "a text", "number": "a number", "whole": "a whole number", "texts": "texts"}


@dataclass(frozen=True)
class Settings:
    """All that answers are made with. Raises InputError for values out of range."""

    model: str = "mistral"
    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 4096
    reasoning_effort: str | None = None
    stop: tuple[str, ...] = ()
    speculate: str = "off"
    kv_bits: int | None = None
    kv_group_size: int = 64
    max_kv_size: int | None = None
    kv_disk: float = 8.0
    kv_disk_bits: int = 8

    def __post_init__(self) -> None:
        _ = self.sampling  # raises
        if self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not all(self.stop):
            raise InputError("stop needs a text")
        if self.max_kv_size is not None and self.max_kv_size < 1:
            raise InputError(f"max_kv_size must be at least 1, not {self.max_kv_size}")
        if not 0 <= self.kv_disk < 1e6:
            raise InputError(f"kv_disk is a number of gigabytes, 0 for none, not {self.kv_disk:g}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )

    @property
    def cache(self) -> CacheOptions:
        return {
            "slack": UNDO_SLACK,
            "kv_bits": self.kv_bits,
            "kv_group_size": self.kv_group_size,
            "max_kv_size": self.max_kv_size,
        }

    def changed(self, values: Mapping[str, Any]) -> Settings:
        """Return settings with other values, as TOML and JSON have them.

        Raises InputError for names and types that do not fit.
        """
        return replace(self, **{name: _checked(name, value) for name, value in values.items()})

    def sets_engine_up_as(self, other: Settings) -> bool:
        """Whether an engine that is set up with these answers by the others, too."""
        return all(getattr(self, name) == getattr(other, name) for name in ENGINE)

    def with_engine_of(self, other: Settings) -> Settings:
        """Return settings that set the engine up as others do."""
        return self.changed({name: getattr(other, name) for name in ENGINE})

    def parsed(self, name: str, text: str) -> Settings:
        """Return settings with a value that the user typed."""
        return self.changed({name: _parsed(name, text)})

    def given(self, names: Mapping[str, Field]) -> dict[str, Any]:
        """The values of `names` that are not the defaults, as JSON and TOML take them."""
        values = asdict(self)
        defaults = {f.name: f.default for f in fields(self)}
        given = {name: values[name] for name in names if values[name] != defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    def shown(self, name: str) -> str:
        """A value as `parsed` reads it."""
        value = getattr(self, name)
        if value is None:
            return "off"
        return ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if type(value) is float else str(value)


def known(values: Mapping[str, Any], names: Mapping[str, Field]) -> dict[str, Any]:
    """Those of `values` that are sound settings today: what is stored may be old."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in names:
            try:
                Settings().changed({name: value})
            except InputError:
                continue
            kept[name] = value
    return kept


def _field(name: str) -> Field:
    if name not in FIELDS:
        raise InputError(f"there is no setting {name!r}; there are {', '.join(FIELDS)}")
    return FIELDS[name]


def _checked(name: str, value: Any) -> Any:
    field = _field(name)
    if field.optional and (value is None or value == "off"):  # TOML has no null
        return None
    if field.kind == "texts" and isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        return tuple(value)
    right = {
        "text": isinstance(value, str),
        "number": type(value) in (int, float),
        "whole": type(value) is int,
        "texts": False,
    }[field.kind]
    if not right or (field.choices and value not in field.choices):
        among = ", ".join("off" if c is None else str(c) for c in field.choices)
        raise InputError(f"{name} must be {among or _WANTED[field.kind]}, not {value!r}")
    return float(value) if field.kind == "number" else value


def _parsed(name: str, text: str) -> Any:
    field, text = _field(name), text.strip()
    if field.kind == "text":
        return text
    if field.kind == "texts":
        return () if text.lower() in _OFF else tuple(part.strip() for part in text.split(",") if part.strip())
    if field.optional and text.lower() in _OFF:
        return None
    try:
        return float(text) if field.kind == "number" else int(text)
    except ValueError:
        return text  # refused by `changed`, in its own words
