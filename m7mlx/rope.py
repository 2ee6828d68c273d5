"""Rotary position embedding as a config.json or params.json describes it.

A position turns each pair of a head's numbers by an angle: plain (arXiv 2104.09864), or stretched
to a longer context by YaRN (arXiv 2309.00071). The formulas are those of transformers
(`modeling_rope_utils.py`, `modeling_ministral3.py`), in float32 as there: far on, the rounding of
the frequencies is what counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from m7mlx.errors import ConfigError
from m7mlx.jsonfile import given, number, said, whole

Floats = npt.NDArray[np.float32]

DEFAULT_THETA = 10000.0
_KNOWN = frozenset(
    [
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "llama_4_scaling_beta",
        "max_position_embeddings",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_type",
        "truncate",
        "type",
    ]
)


@dataclass(frozen=True)
class RopeScaling:
    """What a model does to see further than it was first trained for.

    original_context      tokens of that first training
    factor                YaRN: how many times further the model sees; None where it has no YaRN
    beta_fast, beta_slow  YaRN: frequencies that turn more often than `beta_fast` within the
                          original context stay; those that turn less than `beta_slow` are divided
                          by `factor`
    attention_factor      YaRN: what rotated queries and keys are multiplied by
    truncate              YaRN: whether the bounds between frequencies are rounded to whole ones
    query_beta            queries of position p are multiplied by
                          1 + query_beta · ln(1 + ⌊p / original_context⌋) (`llama_4_scaling_beta`)
    """

    original_context: int
    factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    query_beta: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the form of config.json, as transformers and mlx-lm read it."""
        data: dict[str, Any] = {"rope_type": "default" if self.factor is None else "yarn"}
        data["original_max_position_embeddings"] = self.original_context
        if self.factor is not None:
            # mlx-lm does not read `attention_factor`; its quotient of these two is the same number.
            grown = 0.1 * math.log(max(self.factor, 1.0))
            mscale = 1.0 if grown == 0 else (self.attention_factor * (grown + 1) - 1) / grown
            mscale = max(mscale, 0.0)
            data |= {
                "factor": self.factor,
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                "attention_factor": self.attention_factor,
                "mscale": mscale,
                "mscale_all_dim": 1.0,
                "truncate": self.truncate,
            }
        return data


@dataclass(frozen=True)
class Rope:
    """How positions rotate a head.

    theta     base of the angles
    head_dim  numbers of a head
    scaling   what is done to see further; None for plain rotation
    """

    theta: float
    head_dim: int
    scaling: RopeScaling | None = None

    @cached_property
    def frequencies(self) -> Floats:
        """By how much a position turns each pair of numbers: [head_dim / 2]."""
        dim, yarn = self.head_dim, self.scaling
        powers = self.theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
        kept: Floats = (1 / powers).astype(np.float32)
        if yarn is None or yarn.factor is None:
            return kept
        stretched = 1 / (np.float32(yarn.factor) * powers)
        low, high = (_turning(self, turns, yarn.original_context) for turns in (yarn.beta_fast, yarn.beta_slow))
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if low == high else 0
        ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        share = 1 - np.clip(ramp, 0, 1)
        frequencies: Floats = (stretched * (1 - share) + kept * share).astype(np.float32)
        return frequencies

    @property
    def factor(self) -> float:
        """What rotated queries and keys are multiplied by."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor

    def angles(self, positions: npt.NDArray[np.int64]) -> Floats:  # [rows, L]
        """Return cosines, then sines of the rotation to positions: [rows, L, head_dim]."""
        angles = positions[..., None].astype(np.float32) * self.frequencies
        turned: Floats = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
        return turned if self.factor == 1 else turned * np.float32(self.factor)

    def query_factors(self, positions: npt.NDArray[np.int64]) -> Floats | None:
        """Return what queries of these positions are multiplied by besides; None for nothing."""
        if self.scaling is None or not self.scaling.query_beta:
            return None
        contexts = (positions // self.scaling.original_context).astype(np.float32)
        factors: Floats = 1 + np.float32(self.scaling.query_beta) * np.log1p(contexts)
        return factors


def _turning(rope: Rope, turns: float, context: int) -> float:
    """Return which frequency turns so many times within a context: its place, a fraction."""
    return rope.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


# --- reading --------------------------------------------------------------------------------------


def read_rope(
    data: Mapping[str, Any],
    max_positions: int,
    *,
    default: Mapping[str, Any] | None = None,
    scales_queries: bool = False,
) -> tuple[float, RopeScaling | None]:
    """Return RoPE's base and what is done to it.

    They stand at the top level of config.json, in `rope_scaling`, and, as transformers 5 writes
    them, in `rope_parameters`.

    default         the `rope_parameters` of a file that has neither
    scales_queries  whether `llama_4_scaling_beta` is a part of the architecture

    Raises ConfigError for what contradicts itself or is not understood.
    """
    thetas = [] if data.get("rope_theta") is None else [number(data["rope_theta"], "rope_theta")]
    ropes = {key: given(data, key, "an object") for key in ("rope_parameters", "rope_scaling")}
    if default is not None and not any(ropes.values()):
        ropes["rope_parameters"] = dict(default)
    scalings = []
    for key, rope in ropes.items():
        if not rope:
            continue
        if rope.get("rope_theta") is not None:
            thetas.append(number(rope["rope_theta"], "rope_theta"))
        scalings.append(_read_scaling(rope, key, max_positions, scales_queries))
    if len(set(thetas)) > 1:
        raise ConfigError(f"rope_theta is given twice and contradicts itself: {thetas[0]} and {thetas[1]}")
    if len(set(scalings)) > 1:
        raise ConfigError("rope_parameters and rope_scaling contradict each other; delete one of them")
    theta = thetas[0] if thetas else DEFAULT_THETA
    scaling = scalings[0] if scalings else None
    if scaling is not None and scaling.factor is not None and theta <= 1:
        raise ConfigError(f"rope_theta must be above 1 for YaRN, not {said(theta)}")
    return theta, scaling


def yarn_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Return the attention factor of a model that names none."""

    def grown(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)


def _read_scaling(
    rope: Mapping[str, Any],
    key: str,
    max_positions: int,
    scales_queries: bool,
) -> RopeScaling | None:
    values = {name: value for name, value in rope.items() if value is not None}
    if unknown := sorted(values.keys() - _KNOWN):
        raise ConfigError(f"{key} has {unknown[0][:100]!r}, which is not known here and could change the computation")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{key}: partial_rotary_factor is not supported; RoPE must turn the whole head")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(f"{key} of type {said(kind)} is not supported; plain RoPE and YaRN are")

    def numbered(name: str) -> float | None:
        return number(values[name], f"{key}: {name}") if name in values else None

    query_beta = values.get("llama_4_scaling_beta", 0)
    if query_beta:
        query_beta = number(query_beta, f"{key}: llama_4_scaling_beta")
        if not scales_queries:
            raise ConfigError(f"{key}: llama_4_scaling_beta is a part of ministral3 alone")
    if kind == "default" and not query_beta:
        return None
    original = values.get("original_max_position_embeddings")
    if original is None and kind == "default":
        raise ConfigError(f"{key}: llama_4_scaling_beta needs original_max_position_embeddings")
    original = max_positions if original is None else whole(original, f"{key}: original_max_position_embeddings")
    if kind == "default":
        return RopeScaling(original, query_beta=float(query_beta))
    if "factor" not in rope:
        raise ConfigError(f"{key} of type 'yarn' needs factor")
    factor = numbered("factor") or max_positions / original
    truncate = values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"{key}: truncate must be true or false, not {said(truncate)}")
    # 0 stands for a number that is not given.
    mscales = [numbered(name) if values.get(name) != 0 else None for name in ("mscale", "mscale_all_dim")]
    return RopeScaling(
        original,
        factor=float(factor),
        beta_fast=float(numbered("beta_fast") or 32.0),
        beta_slow=float(numbered("beta_slow") or 1.0),
        attention_factor=float(numbered("attention_factor") or yarn_factor(factor, *mscales)),
        truncate=truncate,
        query_beta=float(query_beta),
    )
