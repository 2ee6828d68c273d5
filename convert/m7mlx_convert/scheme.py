"""Which module gets which bits: one scheme for all, mlx-lm's mixed recipes, rules by pattern."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from m7mlx.errors import ConfigError, InputError
from m7mlx.quantization import BITS, GROUP_SIZES, Quantization

# mlx-lm's recipes: low bits, high bits.
MIXED = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}


def make_scheme(mode: str = "affine", bits: int | None = None, group_size: int | None = None) -> Quantization:
    """Make a scheme with mlx-lm's defaults for what is None. Raises InputError."""
    try:
        return Quantization(group_size or GROUP_SIZES.get(mode, 0), bits or BITS.get(mode, 0), mode)
    except ConfigError as error:
        raise InputError(str(error)) from None


class Rule(NamedTuple):
    """A scheme for modules whose path the pattern matches anywhere; None leaves them as numbers."""

    pattern: re.Pattern[str]
    scheme: Quantization | None

    @classmethod
    def parse(cls, text: str, group_size: int | None = None) -> Rule:
        """Read "PATTERN=BITS", "PATTERN=BITS:GROUP", "PATTERN=MODE" or "PATTERN=none".

        Raises InputError.
        """
        pattern, is_rule, value = text.rpartition("=")
        if not is_rule or not pattern:
            raise InputError(f"{text!r} is no rule; write PATTERN=BITS, for example 'lm_head|embed_tokens=8'")
        try:
            compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{pattern!r} is no regular expression: {error}") from None
        if value == "none":
            return cls(compiled, None)
        if value in GROUP_SIZES:
            return cls(compiled, make_scheme(value))
        match = re.fullmatch(r"(\d)(?::(\d{1,4}))?", value)
        if match is None:
            raise InputError(f"{value!r} in {text!r} is no scheme; write bits (4), bits:group (4:32), a mode or none")
        return cls(compiled, make_scheme("affine", int(match[1]), int(match[2]) if match[2] else group_size))


@dataclass(frozen=True)
class Recipe:
    """The bits that the user asked for.

    base        scheme of every matrix; None keeps each as the source has it
    mixed       one of mlx-lm's recipes (`MIXED`) in the place of `base`'s bits
    rules       exceptions; of those that match, the first one counts
    dequantize  expand what is quantised; `base` must be None
    """

    base: Quantization | None = None
    mixed: str | None = None
    rules: tuple[Rule, ...] = ()
    dequantize: bool = False

    @property
    def quantises(self) -> bool:
        """Tells whether anything may come out in other bits than it went in."""
        return self.base is not None or any(rule.scheme for rule in self.rules)

    def scheme(
        self,
        module: str,
        n_layers: int,
        as_it_is: Quantization | None,
        rule: Rule | None,
    ) -> Quantization | None:
        """Return the scheme of a module's matrix.

        as_it_is  the scheme in which the source holds it
        rule      the first one that matches `module`
        """
        if rule:
            return rule.scheme
        if self.base is None:
            return None if self.dequantize else as_it_is
        if self.mixed:
            low, high = MIXED[self.mixed]
            bits = high if _is_sensitive(module, n_layers) else low
            return Quantization(self.base.group_size, bits)
        return self.base

    @property
    def label(self) -> str:
        """A suffix for the result's name: "4bit", "mxfp4", "mixed_3_6"; empty if not quantised."""
        if self.mixed:
            return self.mixed
        if self.base:
            return f"{self.base.bits}bit" if self.base.mode == "affine" else self.base.mode
        return "mixed" if self.quantises else ""


def _is_sensitive(module: str, n_layers: int) -> bool:
    """Return whether a module gets the high bits, as mlx-lm chooses (`mixed_quant_predicate`).

    That follows llama.cpp's Q4_K_M: the head; values and down projections of the first and last
    eighth of the layers, and of every third between.
    """
    parts = module.split(".")
    layer = int(parts[2]) if parts[:2] == ["model", "layers"] else 0
    eighth = n_layers // 8
    counts = layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
    return "lm_head" in module or (counts and ("v_proj" in module or "down_proj" in module))
