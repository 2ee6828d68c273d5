"""Adapter files: which matrices a LoRA adapter changes, and how.

mlx-lm, adapters.safetensors:

    …q_proj.lora_a [in, r], lora_b [r, out], scale from lora_parameters
    …embed_tokens.lora_a [vocabulary, r], lora_b [r, hidden]
    a full fine-tune has whole weights under the model's own names

PEFT, adapter_model.safetensors:

    …q_proj.lora_A.weight [r, in], lora_B.weight [out, r], scale = alpha / r
    …embed_tokens.lora_embedding_A [r, vocabulary], lora_embedding_B [hidden, r]
    modules_to_save and resized embeddings are whole weights

Modules are named as the text model names them, also where the adapter belongs to a model that wraps
it; what such an adapter does to the vision tower is left out, as the tower is.

A setting that is not understood is refused by name: each library keeps adding settings that change
what is computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from m7mlx.arrays import is_finite
from m7mlx.errors import ConfigError, InputError, WeightsError
from m7mlx.files.patterns import match_patterns
from m7mlx.files.weights import ADAPTERS, FLOATS, StoredTensor, validate_header
from m7mlx.jsonfile import given, number, read_json
from m7mlx.terminal import shown
from m7mlx.text_tower import is_vision, text_name

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SETTINGS = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_PEFT_NAME = re.compile(
    r"base_model\.model\.(.+?)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?"
)
_PEFT_BASE = re.compile(r"base_model\.model\.(.+?)\.base_layer\.weight")
_PEFT_WHOLE = re.compile(r"base_model\.model\.(.+?)(?:\.modules_to_save(?:\.default)?)?\.weight")
_KINDS = {"lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b"}
_KINDS |= {"lora_magnitude_vector": "m", "lora_a": "a", "lora_b": "b", "m": "m"}
# PEFT's settings that are understood, and those that concern training alone, or finding the
# modules, which the names of the tensors tell.
_PEFT_KNOWN = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
    *(
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
    ),
    *(
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
    ),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules"),
    *("task_type", "use_dora", "use_rslora"),
}
# All other initialisations (`LoraLayer.update_layer`) take a part away from the base weights; PEFT
# does so again on loading, or cannot.
_PEFT_INITS = {"true", "false", "gaussian", "eva", "orthogonal", "mica"}


@dataclass(frozen=True)
class Low:
    """The low-rank update of one matrix [out, in].

    names  the tensors in the file, by kind: "a", "b" and for DoRA "m"
    """

    names: Mapping[str, str]
    scale: float
    is_peft: bool
    is_embedding: bool = False

    def merge(self, weight: mx.array, arrays: Mapping[str, mx.array]) -> mx.array:
        """Return the changed matrix, float32 [out, in]; `arrays` are the stored ones by kind."""
        up, down = self.factors(arrays)
        merged = weight.astype(mx.float32) + up @ down
        gain = self.gain(merged, arrays)
        return merged if gain is None else merged * gain

    def factors(self, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        """Return two float32 matrices whose product is added to the weight.

        They are [out, r], scaled, and [r, in]. Raises WeightsError for numbers that are not finite.
        """
        parts = {kind: array.astype(mx.float32) for kind, array in arrays.items()}
        for kind, array in parts.items():
            if not is_finite(array):
                raise WeightsError(f"{self.names[kind]} holds NaN or infinite numbers; the adapter is damaged")
        first, second = (parts["b"], parts["a"]) if self.is_peft else (parts["a"], parts["b"])
        up, down = (second.T, first.T) if self._is_transposed else (first, second)
        return self.scale * up, down

    def gain(self, merged: mx.array, arrays: Mapping[str, mx.array]) -> mx.array | None:
        """Return what DoRA multiplies the sum [out, in] by; None without DoRA.

        It is [out, 1], and [1, in] for PEFT's embeddings.
        """
        if "m" not in arrays:
            return None
        axis = 0 if self.is_peft and self.is_embedding else 1
        norms = mx.sqrt((merged * merged).sum(axis=axis, keepdims=True))
        return arrays["m"].astype(mx.float32).reshape(norms.shape) / norms

    def fits(self, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether stored arrays of these shapes can be merged into a matrix of that shape."""
        first, second = (shapes.get(kind, ()) for kind in ("ba" if self.is_peft else "ab"))
        if not len(shape) == len(first) == len(second) == 2 or first[1] != second[0]:
            return False
        rows, columns = (second[1], first[0]) if self._is_transposed else (first[0], second[1])
        lengths = columns if self.is_peft and self.is_embedding else rows
        return (rows, columns) == shape and math.prod(shapes.get("m", (lengths,))) == lengths

    @property
    def _is_transposed(self) -> bool:
        return self.is_peft == self.is_embedding


@dataclass(frozen=True)
class Changes:
    """All that an adapter changes.

    low    module → its low-rank update
    whole  module → the tensor that replaces its weight
    base   module → the tensor that replaces its weight before the update
    apart  modules of a tied pair that change on their own, so that the model is no longer tied
    """

    low: Mapping[str, Low] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Adapter:
    """An adapter: its file, its settings, the tensors in the file, and what they change."""

    file: Path
    settings: Mapping[str, Any]
    headers: Mapping[str, StoredTensor]
    changes: Changes

    @property
    def folder(self) -> Path:
        """Where it lies; errors name it."""
        return self.file.parent

    def check(self, module: str, shape: tuple[int, ...]) -> None:
        """Raise InputError where the low-rank update of a module does not fit its weight."""
        low = self.changes.low[module]
        shapes = {kind: self.headers[stored].shape for kind, stored in low.names.items()}
        if any(self.headers[stored].dtype not in FLOATS for stored in low.names.values()):
            raise InputError(f"the adapter {self.folder}: the numbers for {module}.weight are no floats")
        if not low.fits(shape, shapes):
            a, b = (list(shapes.get(kind, ())) for kind in "ab")
            raise InputError(
                f"the adapter {self.folder} does not fit {module}.weight {list(shape)}: it has {a} and {b}"
            )

    def check_whole(self, stored: str, shape: tuple[int, ...]) -> None:
        """Raise InputError where a tensor of the file cannot replace a weight of this shape."""
        found = self.headers[stored]
        if found.shape != shape or found.dtype not in FLOATS:
            resized = (
                "; was its vocabulary resized? save the whole model with PEFT's merge_and_unload, and convert that"
            )
            raise InputError(
                f"the adapter {self.folder} has {shown(stored)} {found.dtype} {list(found.shape)}, not floats "
                f"{list(shape)}" + (resized if found.shape[1:] == shape[1:] else "")
            )


def find_adapter(folder: Path) -> Path:
    """Return the weight file in an adapter's folder. Raises InputError where there is none."""
    file = next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)
    if file is None or not (folder / SETTINGS).is_file():
        pickle = " (adapter_model.bin is pickle, which can run code; save it again as safetensors)"
        raise InputError(
            f"{folder} holds no adapter: {SETTINGS} beside {' or '.join(ADAPTERS)}"
            + (pickle if (folder / "adapter_model.bin").is_file() else "")
        )
    return file


def read_adapter(file: Path, is_tied: bool) -> Adapter:
    """Read an adapter; of its weights only the headers.

    file     as `find_adapter` returns it
    is_tied  whether the model's head is tied to its embedding

    Raises InputError for what is damaged or not understood.
    """
    folder = file.parent
    try:
        settings = read_json(folder / SETTINGS)
        found = {name: StoredTensor(file, *info, name) for name, info in validate_header(file).items()}
        headers = {name: t for name, t in found.items() if not is_vision(name.removeprefix(_PEFT_PREFIX))}
        is_peft = file.name == "adapter_model.safetensors"
        changes = peft_changes(settings, headers, is_tied) if is_peft else mlx_lm_changes(settings, headers)
    except (InputError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"the adapter {folder} cannot be used: {error}") from None
    return Adapter(file, settings, headers, changes)


def mlx_lm_changes(settings: Mapping[str, Any], names: Iterable[str]) -> Changes:
    """Return the changes of mlx-lm's adapter. Raises ValueError for what cannot be merged."""
    kind = settings.get("fine_tune_type") or "lora"
    if kind not in ("lora", "dora", "full"):
        raise ValueError(f"fine_tune_type {shown(kind)} is none of lora, dora and full")
    if kind == "full":
        return Changes(whole={text_name(_part_of(name, "full fine-tune")): name for name in names})
    scale = (given(settings, "lora_parameters", "an object") or {}).get("scale")
    if scale is None:
        raise ValueError("adapter_config.json names no scale in lora_parameters")
    scale = _scale(scale, "scale in lora_parameters")
    found: dict[str, dict[str, str]] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b", "m"):
            raise ValueError(f"{shown(name)} is not a part of a LoRA adapter")
        found.setdefault(text_name(module), {})[_KINDS[part]] = name
    _check_parts(found, kind == "dora", "fine_tune_type dora")
    return Changes({module: Low(kinds, scale, False, module == EMBEDDING) for module, kinds in found.items()})


def peft_changes(settings: Mapping[str, Any], headers: Mapping[str, StoredTensor], is_tied: bool) -> Changes:
    """Return the changes of PEFT's adapter, for a model whose head is tied to the embedding or not.

    Raises ValueError for what cannot be merged.
    """
    _check_peft(settings)
    found: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    base: dict[str, str] = {}
    theirs: dict[str, str] = {}  # module → what the adapter calls it
    for name in headers:
        if match := _PEFT_NAME.fullmatch(name):
            module = text_name(match[1])
            if ("embedding" in match[2]) != (module == EMBEDDING) and _KINDS[match[2]] != "m":
                raise ValueError(f"{shown(name)} does not belong to that kind of module")
            theirs[module] = match[1]
            found.setdefault(module, {})[_KINDS[match[2]]] = name
        elif match := _PEFT_BASE.fullmatch(name):
            base[text_name(match[1])] = name
        elif match := _PEFT_WHOLE.fullmatch(name):
            whole[text_name(match[1])] = name
        else:
            raise ValueError(f"{shown(name)} is not a part of a LoRA adapter")
    _check_parts(found, bool(settings.get("use_dora")), "use_dora")
    if both := sorted(found.keys() & whole.keys()):
        raise ValueError(f"{shown(both[0])} is there whole and as LoRA")
    alphas = _alphas(given(settings, "alpha_pattern", "an object") or {}, list(theirs.values()))
    low = {}
    for module, kinds in found.items():
        alpha = alphas.get(theirs[module], settings.get("lora_alpha"))
        rank = next(iter(headers[kinds["a"]].shape), 0)
        if alpha is None or not rank:
            raise ValueError(f"lora_alpha or lora_A is missing for {shown(module)}")
        scale = _scale(alpha, "lora_alpha or alpha_pattern")
        scale /= math.sqrt(rank) if settings.get("use_rslora") else rank
        low[module] = Low(kinds, scale, True, module == EMBEDDING)
    changes = Changes(low, whole, base)
    return _tied(changes, settings) if is_tied else changes


def _tied(changes: Changes, settings: Mapping[str, Any]) -> Changes:
    """Return the changes of a model whose head is tied to its embedding.

    What PEFT wraps changes on its own; what it loads into the model's weight changes both.
    """
    saved = given(settings, "modules_to_save", "a list") or []
    own = {m for m in changes.whole if any(m.endswith(str(key)) for key in saved)} | changes.low.keys()
    whole = {module: name for module, name in changes.whole.items() if module in own}
    shared = {**changes.base, **{m: n for m, n in changes.whole.items() if m not in own}}
    pair = own & {EMBEDDING, HEAD}
    if settings.get("ensure_weight_tying") and pair:
        if EMBEDDING not in pair:
            raise ValueError("ensure_weight_tying without a change of the embedding is not understood")
        pair = set()
        whole.pop(HEAD, None)
        low = {module: change for module, change in changes.low.items() if module != HEAD}
    else:
        low = dict(changes.low)
    base = {module: name for module, name in shared.items() if module not in (EMBEDDING, HEAD)}
    if weight := shared.get(HEAD) or shared.get(EMBEDDING):  # the later one stays
        base |= dict.fromkeys((EMBEDDING, HEAD) if pair else (EMBEDDING,), weight)
    return Changes(low, whole, base, frozenset(pair))


def _check_peft(settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type {shown(settings.get('peft_type'))} is not LORA")
    for key, value in settings.items():
        if value and key not in _PEFT_KNOWN:
            raise ValueError(f"{shown(key)} is not supported")
    if settings.get("bias") not in (None, "none", "lora_only", "all"):  # the model has none
        raise ValueError(f"bias {shown(settings['bias'])} is not known")
    init = settings.get("init_lora_weights", True)
    if str(init).lower() not in _PEFT_INITS:
        raise ValueError(
            f"init_lora_weights {shown(init)} changes the weights that the adapter is added to; where it was "
            "trained, merge it, or save it as plain LoRA (path_initial_model_for_weight_conversion of PEFT)"
        )


def _check_parts(found: Mapping[str, Mapping[str, str]], is_dora: bool, setting: str) -> None:
    for module, kinds in found.items():
        for kind, name in (("a", "lora_A"), ("b", "lora_B")):
            if kind not in kinds:
                raise ValueError(f"{name} is missing for {shown(module)}")
        if ("m" in kinds) != is_dora:
            raise ValueError(
                f"adapter_config.json {'says' if is_dora else 'does not say'} {setting}, but {shown(module)} has "
                f"{'a' if 'm' in kinds else 'no'} magnitude"
            )


def _part_of(name: str, what: str) -> str:
    if not name.endswith(".weight"):
        raise ValueError(f"{shown(name)} is not a part of a {what}")
    return name.removesuffix(".weight")


def _scale(value: Any, field: str) -> float:
    """Check a number that must be finite. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{field} must be a number, not {shown(value)}")
    return 0.0 if value == 0 else math.copysign(number(abs(value), field), value)


def _alphas(patterns: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
    """Return the alpha of single modules: of the first pattern that matches (`get_pattern_key`)."""
    found = match_patterns([rf"\A(.*\.)?({pattern})$" for pattern in patterns], modules)
    values = list(patterns.values())
    return {module: values[numbers[0]] for module, numbers in zip(modules, found, strict=True) if numbers}
