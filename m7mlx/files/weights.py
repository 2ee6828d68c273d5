"""Weight files, checked before MLX reads them.

`mx.load` accepts overlapping, truncated or huge-shaped headers; the safetensors library does not,
so every header goes through it first.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, WeightsError
from m7mlx.jsonfile import read_json, short
from m7mlx.quantization import Quantization
from m7mlx.terminal import one_line
from m7mlx.text_tower import is_vision, text_name

_MOST_INDEX = 64 << 20  # bytes
ADAPTERS = ("adapters.safetensors", "adapter_model.safetensors")  # of mlx-lm and of PEFT
INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")
DTYPES: dict[str, mx.Dtype] = {  # safetensors' names → MLX's types, of those that weights have
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
FP8 = "F8_E4M3"  # safetensors' name of float8_e4m3fn, which MLX reads as bytes
_IGNORED = "rotary_emb.inv_freq"  # old checkpoints carry what is computed anyway


class TensorInfo(NamedTuple):
    """One tensor of a header: safetensors' dtype name ("F32", "BF16", "U32", …) and shape."""

    dtype: str
    shape: tuple[int, ...]


class StoredTensor(NamedTuple):
    """One tensor of a model folder, the file it lies in, and what that file calls it.

    The name differs from the model's own where the model is the text tower of another
    (`m7mlx.text_tower`).
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    name: str

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers, where they have a type that weights can have."""
        return math.prod(self.shape) * DTYPES[self.dtype].size


class Parameter(NamedTuple):
    """One parameter of the model as a folder holds it.

    scheme  None where it is not quantised
    parts   "weight" and, where quantised, "scales" and perhaps "biases"
    """

    scheme: Quantization | None
    parts: dict[str, StoredTensor]


def validate_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name. Raises WeightsError if it is malformed."""
    if not path.is_file():  # a pipe would be waited for
        raise WeightsError(f"{path} is no regular file; fetch or convert it again")
    try:
        with safe_open(str(path), framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            found = {name: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        json.loads(_header(path), object_pairs_hook=_once)  # readers differ in equal names
        return found
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); fetch or convert it again") from None


def data_starts(path: Path) -> dict[str, int]:
    """Return where in a file the numbers of each tensor begin; its header is valid already."""
    text = _header(path)
    start = 8 + len(text)
    return {name: start + e["data_offsets"][0] for name, e in json.loads(text).items() if name != "__metadata__"}


def _header(path: Path) -> bytes:
    """Read the JSON of a header, which the safetensors library has found whole and not too long."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of pairs whose names differ. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for n, (name, _) in enumerate(pairs) if name in dict(pairs[:n]))
        raise ValueError(f"{twice!r} is there twice")
    return found


def read_slices(stored: StoredTensor, start: int, slices: tuple[slice, ...]) -> mx.array:
    """Read some rows and columns of a tensor whose numbers begin at `start`, and nothing else.

    MLX itself reads tensors whole.
    """
    dtype = DTYPES[stored.dtype]
    words = np.dtype(f"u{dtype.size}")  # NumPy has no bfloat16
    data = np.memmap(stored.path, words, "r", start, stored.shape)
    return mx.array(np.ascontiguousarray(data[slices])).view(dtype)


def folder_weights(folder: Path, *, native: bool = False) -> dict[str, StoredTensor]:
    """Return the tensors of a model folder by name; each header is read once.

    native  take the weights in Mistral's own layout, which may lie beside the others

    Index, files and tensors must agree: a missing file, a tensor that the index does not name or a
    stray file beside the indexed ones is refused, never merged or skipped in silence. Tensors of a
    text tower have the names that the text model itself gives them. Raises WeightsError, for a LoRA
    adapter with what to do with it.
    """
    return text_tensors(folder, _folder_tensors(folder, native))


def text_tensors(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return tensors under the names of the text model; raises WeightsError where two share one."""
    found: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        own = text_name(name)
        if own in found:
            raise WeightsError(f"{folder} holds both {short(name)} and {short(found[own].name)}; remove one of them")
        found[own] = stored
    return found


def _folder_tensors(folder: Path, native: bool) -> dict[str, StoredTensor]:
    """Return the tensors of a folder as its files call them."""
    refuse_adapter(folder)
    files = [f for f in sorted(folder.glob("*.safetensors")) if f.name.startswith("consolidated") == native]
    index = folder / (INDEX.replace("model", "consolidated") if native else INDEX)
    if index.is_file():
        return _indexed(folder, index, files)
    if not files:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")])
        if pickles:
            raise WeightsError(
                f"{folder} has only pickle weights ({pickles[0].name}), which can run code; take the repository's "
                "safetensors version, or save it again with transformers' save_pretrained"
            )
        if list(folder.glob("consolidated*.safetensors")):
            raise WeightsError(
                f"{folder} has no weights in Hugging Face's layout, only Mistral's: m7mlx-convert {folder}"
            )
        raise WeightsError(f"{folder} has no weights (model*.safetensors)")
    if len(files) > 1:
        raise WeightsError(f"{folder} has {len(files)} safetensors files but no {index.name} to say which belong")
    return _stored(files[0])


def refuse_adapter(folder: Path) -> None:
    """Raise WeightsError for a folder that holds a LoRA adapter and no weights of a model."""
    settings = folder / "adapter_config.json"
    if settings.is_file() and not any(is_model_file(file.name) for file in folder.glob("*.safetensors")):
        try:
            data = read_json(settings)
        except ConfigError:
            data = {}
        raise WeightsError(adapter_advice(str(folder), data.get("base_model_name_or_path") or data.get("model")))


def is_model_file(name: str) -> bool:
    """Whether a safetensors file can hold a model's weights, judged by its name.

    While it trains, mlx-lm writes adapters as 0000100_adapters.safetensors.
    """
    return name not in ADAPTERS and not name.endswith("_adapters.safetensors")


def adapter_advice(name: str, base: object = None) -> str:
    """Say what to do with an adapter where a model is wanted.

    base  the model that the adapter says it changes, if it does
    """
    model = shlex.quote(one_line(base)[:200]) if isinstance(base, str) and base.strip() else "MODEL"
    return (
        f"{name} is a LoRA adapter, which changes a model and is none; merge it into that model: "
        f"m7mlx-convert {model} --adapter {shlex.quote(name)}"
    )


def _stored(file: Path) -> dict[str, StoredTensor]:
    return {name: StoredTensor(file, *info, name) for name, info in validate_header(file).items()}


def _indexed(folder: Path, index: Path, files: list[Path]) -> dict[str, StoredTensor]:
    try:
        weight_map = read_json(index, _MOST_INDEX).get("weight_map")
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise WeightsError(f"{index} has no weight_map from tensors to files")
    named = set(weight_map.values())
    present = {file.name for file in files}
    if missing := sorted(named - present):
        raise WeightsError(f"{folder} lacks {short(missing[0])}, which {INDEX} names; fetch the model again")
    if stray := sorted(present - named):
        raise WeightsError(f"{folder} has {short(stray[0])}, which {INDEX} does not name; remove one of them")
    found: dict[str, StoredTensor] = {}
    for name in sorted(named):
        for tensor, stored in _stored(folder / name).items():
            if weight_map.get(tensor) != name:
                raise WeightsError(f"{folder / name} holds {short(tensor)}, which {INDEX} does not place there")
            found[tensor] = stored
    if absent := sorted(set(weight_map) - set(found)):
        raise WeightsError(f"{folder / weight_map[absent[0]]} lacks {short(absent[0])}, which {INDEX} places there")
    return found


def check_layer_count(
    where: Path,
    config: ModelConfig,
    tensors: int,
    named_by: str = "config.json",
) -> None:
    """Raise WeightsError for more layers than tensors: a billion would fill the memory."""
    if config.n_layers > tensors:
        raise WeightsError(f"{where}: {named_by} says {config.n_layers} layers, but there are {tensors} tensors")


def parameters(folder: Path, config: ModelConfig, headers: Mapping[str, StoredTensor]) -> dict[str, Parameter]:
    """Return the model's parameters by their name on disk, each compared with the config.

    Raises WeightsError for a tensor that is missing, of another shape or type, or not a part of the
    model.
    """
    check_layer_count(folder, config, len(headers))
    found = {name: _parameter(folder, config, name, shape, headers) for name, shape in config.weight_shapes().items()}
    known = {f"{name.removesuffix('.weight')}.{kind}" for name, stored in found.items() for kind in stored.parts}
    for name in sorted(headers.keys() - known):
        if not is_left_out(name, config):
            raise WeightsError(f"{folder}: tensor {name} is not a part of {config.model_type}")
    return found


def is_left_out(name: str, config: ModelConfig) -> bool:
    """Whether a tensor may be in a file although the model does not use it.

    That is what is computed anyway, what sees pictures, and a head that is stored although it is
    tied (`m7mlx.files.tied_head`).
    """
    return name.endswith(_IGNORED) or is_vision(name) or (config.tie_word_embeddings and name.startswith("lm_head."))


def _parameter(
    folder: Path,
    config: ModelConfig,
    name: str,
    shape: tuple[int, ...],
    headers: Mapping[str, StoredTensor],
) -> Parameter:
    module = name.removesuffix(".weight")
    scheme = config.quantization.for_module(module) if config.quantization and len(shape) == 2 else None
    if f"{module}.scales" not in headers:
        scheme = None  # mlx-lm leaves out what its groups do not divide
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {"weight": (FLOATS, shape)}
    if scheme:
        rows, columns = shape
        if columns % scheme.group_size:
            raise WeightsError(
                f"{folder}: {module} has {columns} columns, which groups of {scheme.group_size} do not divide"
            )
        groups = (FLOATS if scheme.mode == "affine" else ("U8",), (rows, columns // scheme.group_size))
        expected = {"weight": (("U32",), (rows, columns * scheme.bits // 32)), "scales": groups}
        if scheme.mode == "affine":
            expected["biases"] = groups
    parts = {}
    for kind, (dtypes, wanted) in expected.items():
        stored = headers.get(f"{module}.{kind}")
        if stored is None:
            raise WeightsError(f"{folder}: tensor {module}.{kind} is missing")
        if stored.dtype not in dtypes:
            raise WeightsError(f"{folder}: {module}.{kind} has type {stored.dtype}, which is not supported here")
        if stored.shape != wanted:
            raise WeightsError(
                f"{folder}: {module}.{kind} has shape {list(stored.shape)}, config.json says {list(wanted)}"
            )
        parts[kind] = stored
    return Parameter(scheme, parts)
