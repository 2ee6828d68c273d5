"""What a conversion reads: one interface for every kind of folder and file."""

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
from m7mlx.errors import InputError
from m7mlx.files.weights import StoredTensor
from m7mlx.quantization import Quantization
from m7mlx.terminal import shown

FLOATS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
Arrays = dict[str, mx.array]  # {"weight"}, or {"weight", "scales"[, "biases"]}


@dataclass(frozen=True)
class Tensor:
    """One parameter of the model as the source holds it, read only when `load` is called.

    shape     of the unquantised parameter
    dtype     of the weight; of one that is quantised, the type it expands to
    load      reads {"weight"}, or what `scheme` makes of it
    scheme    how `load` gives it
    default   the scheme of the result where the user asks for none; a weight that an adapter was merged into goes
              back to the scheme it had
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    load: Callable[[], Arrays]
    scheme: Quantization | None = None
    default: Quantization | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it is the matrix of a linear layer or of the embedding, which can be quantised."""
        return len(self.shape) == 2

    @property
    def size(self) -> int:
        """Count of its numbers."""
        return math.prod(self.shape)

    def floats(self) -> mx.array:
        """The weight unquantised: as stored, or expanded to float32."""
        return self.expand(self.load())

    def expand(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """The same of what `load` gave, or of some rows of it."""
        return dequantize(arrays, self.scheme) if self.scheme else arrays["weight"]


@dataclass(frozen=True)
class Source:
    """Everything a conversion needs to know of what it converts."""

    name: str  # of the model, for the default output and the card
    config: ModelConfig
    raw_config: Mapping[str, Any]  # config.json as it will be written, without `quantization`
    tensors: Mapping[str, Tensor]  # by name on disk, in the model's order
    files: Mapping[str, Path | bytes] = field(default_factory=dict)  # tokenizer and the like, by name
    weight_files: tuple[Path, ...] = ()  # what `load` reads; empty where that cannot be read a second time
    settings: Mapping[str, Any] = field(default_factory=dict)  # what else decides what `load` makes of them, as JSON
    licence: str | None = None
    notes: tuple[str, ...] = ()  # what the user should know, a line each


def reader(headers: Mapping[str, StoredTensor], names: Mapping[str, str]) -> Callable[[], Arrays]:
    """A `Tensor.load` for tensors of safetensors files: kind ("weight", "scales", …) → its name on disk."""

    def read() -> Arrays:
        arrays = {}
        for kind, name in names.items():
            # Opening reads the header only; an array is read when it is evaluated.
            file = mx.load(str(headers[name].path))
            assert isinstance(file, dict)
            arrays[kind] = file[name]
        return arrays

    return read


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Raise InputError for a file of a source that is a link out of it: what it leads to was never meant to be
    converted, and would be published with the result.

    The Hub's cache is made of links, from models--org--name/snapshots/… into models--org--name/blobs.
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
    """The type that a config.json names."""
    return FLOATS.get(str(config.get("torch_dtype") or config.get("dtype")))
