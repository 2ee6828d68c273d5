"""A conversion's input: one interface for every kind of folder and file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from m7mlx.arrays import dequantize
from m7mlx.config import ModelConfig
from m7mlx.errors import InputError, WeightsError
from m7mlx.files.weights import DTYPES, StoredTensor, is_left_out
from m7mlx.files.weights import FLOATS as STORED_FLOATS
from m7mlx.quantization import Quantization
from m7mlx.terminal import shown

FLOATS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
Arrays = dict[str, mx.array]  # {"weight"}, or {"weight", "scales"[, "biases"]}


@dataclass(frozen=True)
class Tensor:
    """One parameter of the model as the source holds it, read only when `read` is called.

    shape       of the unquantised parameter
    dtype       of the weight; of one that is quantised, the type it expands to
    read        gives {"weight"}, or what `scheme` makes of it
    scheme      how `read` gives it
    default     the scheme of the result where the user asks for none; a weight that an adapter was
                merged into goes back to the scheme it had
    is_widened  whether `read` gives float32 for a narrower type
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], Arrays]
    scheme: Quantization | None = None
    default: Quantization | None = None
    is_widened: bool = False

    @property
    def is_matrix(self) -> bool:
        """Tells the matrices of linear layers and of the embedding, which can be quantised."""
        return len(self.shape) == 2

    @property
    def size(self) -> int:
        """Count of its numbers."""
        return math.prod(self.shape)

    def floats(self) -> mx.array:
        """Read the weight unquantised: as stored, or expanded to float32."""
        return self.expand(self.read())

    def expand(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """Return the unquantised weight of what `read` gave, or of some rows of it."""
        return dequantize(arrays, self.scheme) if self.scheme else arrays["weight"]


@dataclass(frozen=True)
class Source:
    """Everything a conversion needs to know of the model that it converts.

    name          of the model, for the default output and the card
    raw_config    config.json as it will be written, without `quantization`
    tensors       by name on disk, in the model's order
    files         the tokenizer and the like, by name
    weight_files  where the tensors are read from; empty where they cannot be read a second time
    settings      what else decides the numbers that are read, as JSON
    notes         what the user should know, a line each
    """

    name: str
    config: ModelConfig
    raw_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    weight_files: tuple[Path, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    notes: tuple[str, ...] = ()


def make_reader(headers: Mapping[str, StoredTensor], names: Mapping[str, str]) -> Callable[[], Arrays]:
    """Return a `Tensor.read` for tensors of safetensors files.

    names  kind ("weight", "scales", …) → the tensor's name in `headers`
    """

    def read() -> Arrays:
        arrays = {}
        for kind, name in names.items():
            # Opening reads the header only; an array is read when it is evaluated.
            file = mx.load(str(headers[name].path))
            assert isinstance(file, dict)
            arrays[kind] = file[headers[name].name]
        return arrays

    return read


def open_floats(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    headers: Mapping[str, StoredTensor],
) -> Tensor:
    """Return a parameter of a packed model that is not packed.

    Raises WeightsError where it is missing, or not of the type and shape that config.json says.
    """
    stored = headers.get(name)
    if stored is None or stored.shape != shape or stored.dtype not in STORED_FLOATS:
        actual = f"is {stored.dtype} {list(stored.shape)}" if stored else "is missing"
        raise WeightsError(f"{folder}: {name} {actual}; config.json says floats {list(shape)}")
    return Tensor(shape, DTYPES[stored.dtype], make_reader(headers, {"weight": name}))


def check_left(folder: Path, config: ModelConfig, names: Iterable[str]) -> None:
    """Raise WeightsError for a tensor that is left over and has an effect."""
    for name in sorted(names):
        if not is_left_out(name, config):
            raise WeightsError(f"{folder}: tensor {shown(name)} is not a part of {config.model_type}")


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Raise InputError for a file of the source that is a link out of its folder.

    What such a link leads to was never meant to be converted, and would be published with the
    result. The Hub's cache is made of links, from models--org--name/snapshots/… into
    models--org--name/blobs: those are followed.
    """
    home = Path(os.path.realpath(folder))
    homes = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        homes.append(home.parent.parent / "blobs")
    for file in files:
        found = Path(os.path.realpath(file))
        if not any(found.is_relative_to(allowed) for allowed in homes):
            raise InputError(
                f"{file} is a link to {shown(found)}, outside of the folder; put the file itself there if it belongs"
            )


def named_dtype(config: Mapping[str, Any]) -> mx.Dtype | None:
    """Return the type that a config.json names, if it is one of `FLOATS`."""
    return FLOATS.get(str(config.get("torch_dtype") or config.get("dtype")))
