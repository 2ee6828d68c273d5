"""What a conversion reads: one interface for Hugging Face folders and GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from m7mlx.config import ModelConfig, Quantization, read_json
from m7mlx.errors import WeightsError
from m7mlx.safetensors import TensorInfo, folder_weights, validate_header

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_OTHER_FILES = ("generation_config.json", "chat_template.jinja", "LICENSE*")
# What points to code in the folder; none of it is run here, and none is passed on.
_CODE_KEYS = ("auto_map", "model_file")
MLX_DTYPES: dict[str, mx.Dtype] = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}


@dataclass(frozen=True)
class Tensor:
    """One parameter of the model as the source holds it, read only when `load` is called.

    `load` gives {"weight": …}, or {"weight", "scales", "biases"} where the source is quantised by `scheme`.
    """

    shape: tuple[int, ...]  # of the unquantised parameter
    dtype: mx.Dtype  # of the weight, or of scales and biases
    load: Callable[[], dict[str, mx.array]]
    scheme: Quantization | None = None


@dataclass(frozen=True)
class Source:
    """Everything a conversion needs to know of what it converts."""

    name: str  # of the model, for the default output and the card
    config: ModelConfig
    raw_config: Mapping[str, Any]  # config.json as it will be written, without `quantization`
    tensors: Mapping[str, Tensor]  # by name on disk, in the model's order
    files: Mapping[str, Path | bytes] = field(default_factory=dict)  # tokenizer and the like, by name
    licence: str | None = None
    notes: tuple[str, ...] = ()  # what the user should know, a line each


def open_source(path: Path, name: str) -> Source:
    """Open a folder or a GGUF file. Raises ConfigError, WeightsError, TokenizerError."""
    if path.is_file():
        from m7mlx_convert.gguf import open_gguf

        return open_gguf(path)
    return open_folder(path, name)


def open_folder(folder: Path, name: str) -> Source:
    """A folder in Hugging Face's layout, quantised by mlx-lm or m7mlx-convert or not at all."""
    config = ModelConfig.from_folder(folder)
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else config.to_dict()
    drop = {"quantization", "quantization_config", *_CODE_KEYS}
    files = {p.name: p for pattern in (*_TOKENIZER_FILES, *_OTHER_FILES) for p in sorted(folder.glob(pattern))}
    return Source(
        name=name,
        config=config,
        raw_config={k: v for k, v in raw.items() if k not in drop},
        tensors=dict(_folder_tensors(folder, config)),
        files={n: p for n, p in files.items() if p.is_file() and p.suffix != ".py"},
        licence=_licence(folder),
    )


def _folder_tensors(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    where = folder_weights(folder)
    headers: dict[str, TensorInfo] = {}
    for path in sorted(set(where.values())):
        headers |= validate_header(path)
    known = set()
    for name, shape in config.weight_shapes().items():
        module = name.removesuffix(".weight")
        names = {k: f"{module}.{k}" for k in ("weight", "scales", "biases") if f"{module}.{k}" in headers}
        if "weight" not in names:
            raise WeightsError(f"{folder}: tensor {name} is missing")
        scheme = config.quantization.for_module(module) if config.quantization and "scales" in names else None
        floats = headers[names["scales"] if scheme else name]
        stored = (shape[0], shape[1] * scheme.bits // 32) if scheme else shape
        if headers[name].shape != stored:
            found = list(headers[name].shape)
            raise WeightsError(f"{folder}: {name} has shape {found}, config.json says {list(stored)}")
        if floats.dtype not in ("F32", "F16", "BF16"):
            raise WeightsError(f"{folder}: {name} has type {floats.dtype}, which is not supported here")
        known |= set(names.values())
        yield name, Tensor(shape, MLX_DTYPES[floats.dtype], _reader(where, names), scheme)
    for name in headers.keys() - known:
        if not name.endswith("rotary_emb.inv_freq") and not (
            config.tie_word_embeddings and name.startswith("lm_head.")
        ):
            raise WeightsError(f"{folder}: tensor {name} is not a part of {config.model_type}")


def _reader(where: Mapping[str, Path], names: Mapping[str, str]) -> Callable[[], dict[str, mx.array]]:
    def read() -> dict[str, mx.array]:
        arrays = {}
        for kind, name in names.items():
            # Opening reads the header only; an array is read when it is evaluated.
            file = mx.load(str(where[name]))
            assert isinstance(file, dict)
            arrays[kind] = file[name]
        return arrays

    return read


def _licence(folder: Path) -> str | None:
    """The licence that the source's own model card names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:100]
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(("license:", "licence:")))
    return next(found, None) or None
