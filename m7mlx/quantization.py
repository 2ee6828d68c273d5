"""How weights are quantised, as mlx-lm writes it into config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from m7mlx.errors import ConfigError
from m7mlx.jsonfile import said, whole
from m7mlx.text_tower import text_name

_MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # mode → bits, group sizes
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
# MLX's defaults, for a config that says null, as mlx-lm writes it for its mixed recipes.
GROUP_SIZES = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
BITS = {"affine": 4, "mxfp4": 4, "mxfp8": 8, "nvfp4": 4}


@dataclass(frozen=True)
class Quantization:
    """How weights are quantised: mlx-lm's `quantization` key of config.json.

    overrides  a module's path ("model.embed_tokens") → its own scheme; None leaves it unquantised
    """

    group_size: int
    bits: int
    mode: str = "affine"
    overrides: Mapping[str, Quantization | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bits, groups = _MODES.get(self.mode, ((), ()))
        if not bits:
            raise ConfigError(f"quantization mode {said(self.mode)} is not known; known are {', '.join(_MODES)}")
        if self.bits not in bits or self.group_size not in groups:
            raise ConfigError(
                f"{self.mode} quantization with {self.bits} bits in groups of {self.group_size} does not exist; "
                f"bits may be {', '.join(map(str, bits))}, groups {', '.join(map(str, groups))}"
            )

    def for_module(self, path: str) -> Quantization | None:
        """Return the scheme of a module ("lm_head"); None if it is not quantised."""
        return self.overrides[path] if path in self.overrides else replace(self, overrides={})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quantization:
        """Read mlx-lm's form: {"group_size": 64, "bits": 4, "mode": …, "<path>": {…} | false}.

        Paths are those of the text model, also where mlx-lm wrote those of a model that wraps it.
        """
        overrides: dict[str, Quantization | None] = {}
        for path, value in data.items():
            if isinstance(value, Mapping):
                overrides[text_name(path)] = cls._one(value)
            elif isinstance(value, bool):
                overrides[text_name(path)] = None
        return replace(cls._one(data), overrides=overrides)

    @classmethod
    def _one(cls, data: Mapping[str, Any]) -> Quantization:
        mode = data.get("mode") or "affine"
        if not isinstance(mode, str):
            raise ConfigError(f"quantization: mode must be a text, not {said(mode)}")
        numbers = {}
        for key, defaults in (("group_size", GROUP_SIZES), ("bits", BITS)):
            if key not in data:
                raise ConfigError(f"quantization needs {key}")
            value = defaults.get(mode) if data[key] is None else data[key]
            if value is not None or mode in _MODES:
                numbers[key] = whole(value, f"quantization: {key}")
        return cls(numbers.get("group_size", 0), numbers.get("bits", 0), mode)

    def to_dict(self) -> dict[str, Any]:
        """Return the form that `from_dict` reads."""
        data: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        for path, scheme in self.overrides.items():
            data[path] = scheme.to_dict() if scheme else False
        return data
