"""Weight files, checked before MLX reads them.

`mx.load` accepts overlapping, truncated or huge-shaped headers; the safetensors library does not, so every
header goes through it first.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from m7mlx.config import read_json
from m7mlx.errors import ConfigError, WeightsError

INDEX = "model.safetensors.index.json"


class TensorInfo(NamedTuple):
    """One tensor of a header: safetensors' dtype name ("F32", "BF16", "U32", …) and shape."""

    dtype: str
    shape: tuple[int, ...]


class StoredTensor(NamedTuple):
    """One tensor of a model folder, and the file it lies in."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def validate_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, by name. Raises WeightsError for anything malformed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {name: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); fetch or convert it again") from None


def folder_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder, by name; each header is read once. Raises WeightsError.

    Index, files and tensors must agree: a shard missing from the folder, a tensor the index does not
    name or a stray file beside the indexed ones is refused, never merged or skipped in silence.
    """
    # Mistral's repositories hold their own copy of the weights beside the shards, under this name.
    files = [f for f in sorted(folder.glob("*.safetensors")) if not f.name.startswith("consolidated")]
    index = folder / INDEX
    if index.is_file():
        return _indexed(folder, index, files)
    if not files:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")])
        if pickles:
            raise WeightsError(
                f"{folder} has only pickle weights ({pickles[0].name}), which can run code; take the repository's "
                "safetensors version, or save it again with transformers' save_pretrained"
            )
        own = " in Hugging Face's layout" if list(folder.glob("consolidated*")) else ""
        raise WeightsError(f"{folder} has no weights{own} (model*.safetensors)")
    if len(files) > 1:
        raise WeightsError(f"{folder} has {len(files)} safetensors files but no {INDEX} to say which belong")
    return _stored(files[0])


def _stored(file: Path) -> dict[str, StoredTensor]:
    return {name: StoredTensor(file, *info) for name, info in validate_header(file).items()}


def _indexed(folder: Path, index: Path, files: list[Path]) -> dict[str, StoredTensor]:
    try:
        weight_map = read_json(index).get("weight_map")
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise WeightsError(f"{index} has no weight_map from tensors to files")
    named = set(weight_map.values())
    present = {file.name for file in files}
    if missing := sorted(named - present):
        raise WeightsError(f"{folder} lacks {missing[0]}, which {INDEX} names; fetch the model again")
    if stray := sorted(present - named):
        raise WeightsError(f"{folder} has {stray[0]}, which {INDEX} does not name; remove one of them")
    found: dict[str, StoredTensor] = {}
    for name in sorted(named):
        for tensor, stored in _stored(folder / name).items():
            if weight_map.get(tensor) != name:
                raise WeightsError(f"{folder / name} holds {tensor}, which {INDEX} does not place there")
            found[tensor] = stored
    if absent := sorted(set(weight_map) - set(found)):
        raise WeightsError(f"{folder / weight_map[absent[0]]} lacks {absent[0]}, which {INDEX} places there")
    return found
