"""LoRA adapters, mlx-lm's and PEFT's, merged into the weights: W + scale · B A (DoRA: its rows rescaled).

mlx-lm  adapters.safetensors       …q_proj.lora_a [in, r], lora_b [r, out], scale from lora_parameters
PEFT    adapter_model.safetensors  …q_proj.lora_A.weight [r, in], lora_B.weight [out, r], scale = alpha / r
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from m7mlx.arrays import is_finite
from m7mlx.errors import ConfigError, InputError, WeightsError
from m7mlx.jsonfile import given, number, read_json
from m7mlx.safetensors import StoredTensor, validate_header
from m7mlx_convert.patterns import matches
from m7mlx_convert.source import Arrays, Source, Tensor, check_links, reader, shown

_PEFT_NAME = re.compile(r"base_model\.model\.(.+?)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
_PEFT_WHOLE = re.compile(r"base_model\.model\.(.+?)(?:\.modules_to_save(?:\.default)?)?\.weight")
_KINDS = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m", "lora_a": "a", "lora_b": "b", "m": "m"}
_PEFT_UNSUPPORTED = ("fan_in_fan_out", "layer_replication", "lora_bias", "use_qalora", "trainable_token_indices")


@dataclass(frozen=True)
class _Low:
    """The update of one matrix [out, in]: names in the file, by kind ("a", "b" and for DoRA "m")."""

    names: Mapping[str, str]
    scale: float
    is_peft: bool

    def merge(self, weight: mx.array, read: Callable[[], Arrays]) -> mx.array:
        """float32 [out, in]."""
        parts = {kind: array.astype(mx.float32) for kind, array in read().items()}
        for kind, array in parts.items():
            if not is_finite(array):
                raise WeightsError(f"{self.names[kind]} holds NaN or infinite numbers; the adapter is damaged")
        product = parts["b"] @ parts["a"] if self.is_peft else parts["b"].T @ parts["a"].T
        merged = weight.astype(mx.float32) + self.scale * product
        if "m" in parts:
            norms = mx.sqrt((merged * merged).sum(axis=1))
            merged = merged * (parts["m"].reshape(-1) / norms)[:, None]
        return merged


def with_adapter(source: Source, folder: Path) -> Source:
    """`source` with an adapter merged into it. Raises InputError and its kin."""
    names = ("adapters.safetensors", "adapter_model.safetensors")
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None or not (folder / "adapter_config.json").is_file():
        pickle = " (adapter_model.bin is pickle, which can run code; save it again as safetensors)"
        raise InputError(
            f"{folder} holds no adapter: adapter_config.json beside {' or '.join(names)}"
            + (pickle if (folder / "adapter_model.bin").is_file() else "")
        )
    check_links(folder, (file, folder / "adapter_config.json"))
    try:
        settings = read_json(folder / "adapter_config.json")
        is_peft = file.name == names[1]
        headers = {name: StoredTensor(file, *info) for name, info in validate_header(file).items()}
        lows, whole = _peft(settings, headers) if is_peft else _mlx_lm(settings, headers)
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"the adapter {folder} cannot be merged: {error}") from None
    tensors = dict(source.tensors)
    for module in [*lows, *whole]:
        if f"{module}.weight" not in tensors:
            raise InputError(f"the adapter {folder} changes {shown(module)}, which is not a part of {source.name}")
    for module, low in lows.items():
        name = f"{module}.weight"
        _check(folder, name, tensors[name], low, headers)
        tensors[name] = _merged(tensors[name], low, reader(headers, low.names))
    for module, stored in whole.items():
        tensor = tensors[f"{module}.weight"]
        if headers[stored].shape != tensor.shape:
            raise InputError(f"the adapter {folder} has {stored} {list(headers[stored].shape)}, not {tensor.shape}")
        read = reader(headers, {"weight": stored})
        tensors[f"{module}.weight"] = replace(tensor, load=read, scheme=None)
    files = (*source.weight_files, file) if source.weight_files else ()
    note = f"the adapter {shown(folder.resolve().name)} changes {len(lows) + len(whole)} of {len(tensors)} parameters"
    return replace(source, tensors=tensors, weight_files=files, notes=(*source.notes, note))


def _merged(tensor: Tensor, low: _Low, read: Callable[[], Arrays]) -> Tensor:
    def load() -> Arrays:
        return {"weight": low.merge(tensor.floats(), read).astype(tensor.dtype)}

    return replace(tensor, load=load, scheme=None)


def _mlx_lm(
    settings: Mapping[str, Any], headers: Mapping[str, StoredTensor]
) -> tuple[dict[str, _Low], dict[str, str]]:
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ValueError(f"fine_tune_type {shown(kind)} is not LoRA")
    scale = (given(settings, "lora_parameters", "an object") or {}).get("scale")
    if scale is None:
        raise ValueError("adapter_config.json names no scale in lora_parameters")
    scale = _scale(scale, "scale in lora_parameters")
    names: dict[str, dict[str, str]] = {}
    for name in headers:
        module, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b", "m"):
            raise ValueError(f"{shown(name)} is not a part of a LoRA adapter")
        names.setdefault(module, {})[_KINDS[part]] = name
    return {module: _Low(found, float(scale), False) for module, found in names.items()}, {}


def _peft(settings: Mapping[str, Any], headers: Mapping[str, StoredTensor]) -> tuple[dict[str, _Low], dict[str, str]]:
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type {shown(settings.get('peft_type'))} is not LORA")
    for key in _PEFT_UNSUPPORTED:
        if settings.get(key):
            raise ValueError(f"{key} is not supported")
    names: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in headers:
        if match := _PEFT_NAME.fullmatch(name):
            names.setdefault(match[1], {})[_KINDS[match[2]]] = name
        elif match := _PEFT_WHOLE.fullmatch(name):
            whole[match[1]] = name
        else:
            raise ValueError(f"{shown(name)} is not a part of a LoRA adapter")
    lows = {}
    alphas = _alphas(given(settings, "alpha_pattern", "an object") or {}, list(names))
    for module, found in names.items():
        alpha = alphas.get(module, settings.get("lora_alpha"))
        rank = headers[found["a"]].shape[0] if "a" in found else 0
        if alpha is None or not rank:
            raise ValueError(f"lora_alpha or lora_A is missing for {shown(module)}")
        scale = _scale(alpha, "lora_alpha or alpha_pattern") / (
            math.sqrt(rank) if settings.get("use_rslora") else rank
        )
        lows[module] = _Low(found, float(scale), True)
    return lows, whole


def _scale(value: Any, field: str) -> float:
    """Any number, as a float has it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{field} must be a number, not {shown(value)}")
    return 0.0 if value == 0 else math.copysign(number(abs(value), field), value)


def _alphas(patterns: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
    """PEFT's way of giving single modules their own value (`get_pattern_key`): the first pattern that matches."""
    found = matches([rf"\A(.*\.)?({pattern})$" for pattern in patterns], modules)
    values = list(patterns.values())
    return {module: values[numbers[0]] for module, numbers in zip(modules, found, strict=True) if numbers}


def _check(folder: Path, name: str, tensor: Tensor, low: _Low, headers: Mapping[str, StoredTensor]) -> None:
    shapes = {kind: headers[stored].shape for kind, stored in low.names.items()}
    if any(headers[stored].dtype not in ("F32", "F16", "BF16") for stored in low.names.values()):
        raise InputError(f"the adapter {folder}: the numbers for {name} are no floats")
    a, b = shapes.get("a", ()), shapes.get("b", ())
    if len(a) == len(b) == 2 and len(tensor.shape) == 2:
        rows, columns = tensor.shape
        rank = a[0] if low.is_peft else a[1]
        expected = ((rank, columns), (rows, rank)) if low.is_peft else ((columns, rank), (rank, rows))
        if (a, b) == expected and math.prod(shapes.get("m", (rows,))) == rows:
            return
    raise InputError(f"the adapter {folder} does not fit {name} {list(tensor.shape)}: it has {list(a)} and {list(b)}")
