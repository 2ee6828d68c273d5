"""What a conversion reads: one interface for Hugging Face folders and GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from m7mlx.config import ModelConfig, read_json
from m7mlx.errors import ConfigError, WeightsError
from m7mlx.quantization import Quantization
from m7mlx.safetensors import StoredTensor, folder_weights
from m7mlx_convert.writer import DTYPE_NAMES, stored_specs

# By name, not by pattern: a "tokenizer.bin" may be pickle, a "tokenizer.py" is code.
_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v1",
    "tokenizer.model.v2",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
# What points to code in the folder; none of it is run here, and none is passed on.
_CODE_KEYS = frozenset({"auto_map", "model_file"})
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Tensor:
    """One parameter of the model as the source holds it, read only when `load` is called.

    `load` gives {"weight": …}, or what `scheme` makes of it ({"weight", "scales", "biases"}); `expand` gives the
    weight of a quantised one as floats, where the source can.
    """

    shape: tuple[int, ...]  # of the unquantised parameter
    dtype: mx.Dtype  # of the weight, or of the scales
    load: Callable[[], dict[str, mx.array]]
    scheme: Quantization | None = None
    expand: Callable[[], dict[str, mx.array]] | None = None


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
    return Source(
        name=name,
        config=config,
        raw_config=_whole_config(folder, config),
        tensors=dict(_folder_tensors(folder, config)),
        files={n: _without_code(folder / n) for n in _COPIED if (folder / n).is_file()},
        licence=_licence(folder),
    )


def _whole_config(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """The source's config.json, and what it leaves to defaults written out.

    Readers differ in their defaults: mlx-lm ties the head where tie_word_embeddings is absent, and does not look
    for RoPE's base in rope_parameters.
    """
    path = folder / "config.json"
    given = read_json(path) if path.is_file() else {}
    may_be_null = {"sliding_window", "bos_token_id", "eos_token_id"}
    absent = {
        k: v for k, v in config.to_dict().items() if given.get(k) is None and (k not in given or k not in may_be_null)
    }
    whole = given | absent
    return {k: v for k, v in whole.items() if k not in _CODE_KEYS | {"quantization", "quantization_config"}}


def shown(text: object) -> str:
    """What a file of a stranger says, as one printable line of bounded length for a message or a card."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)[:200]).split())
    return line if len(line) <= 100 else line[:99] + "…"


def _without_code(path: Path) -> Path | bytes:
    """The file, or its content where keys that point to code had to be taken out."""
    if not path.name.endswith("_config.json"):
        return path
    try:
        data = read_json(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; fetch it again") from None
    if not _CODE_KEYS & data.keys():
        return path
    kept = {k: v for k, v in data.items() if k not in _CODE_KEYS}
    return json.dumps(kept, ensure_ascii=False, indent=2).encode()


def _folder_tensors(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    headers = folder_weights(folder)
    if config.n_layers > len(headers):
        raise WeightsError(
            f"{folder}: config.json says {config.n_layers} layers, the files hold {len(headers)} tensors"
        )
    known = set()
    for name, shape in config.weight_shapes().items():
        module = name.removesuffix(".weight")
        is_quantised = config.quantization and f"{module}.scales" in headers  # mlx-lm leaves some modules as they are
        scheme = config.quantization.for_module(module) if config.quantization and is_quantised else None
        found = headers.get(f"{module}.scales" if scheme else name)
        if found is None:
            raise WeightsError(f"{folder}: tensor {name} is missing")
        dtype = _DTYPES.get(found.dtype, mx.uint32)
        if (dtype == mx.uint8) != (scheme is not None and scheme.mode != "affine") or dtype == mx.uint32:
            raise WeightsError(f"{folder}: {name} has type {found.dtype}, which is not supported here")
        specs = stored_specs(name, shape, dtype, scheme)
        for spec in specs:
            stored = headers.get(spec.name)
            if stored is None or stored[1:] != (DTYPE_NAMES[spec.dtype], spec.shape):
                is_ = f"is {stored.dtype} {list(stored.shape)}" if stored else "is missing"
                wanted = f"{DTYPE_NAMES[spec.dtype]} {list(spec.shape)}"
                raise WeightsError(f"{folder}: {spec.name} {is_}; by config.json it should be {wanted}")
        known |= {spec.name for spec in specs}
        yield name, Tensor(shape, dtype, _reader(headers, [spec.name for spec in specs]), scheme)
    for name in headers.keys() - known:
        is_tied_head = config.tie_word_embeddings and name.startswith("lm_head.")
        if not name.endswith("rotary_emb.inv_freq") and not is_tied_head:
            raise WeightsError(f"{folder}: tensor {shown(name)} is not a part of {config.model_type}")


def _reader(where: Mapping[str, StoredTensor], names: list[str]) -> Callable[[], dict[str, mx.array]]:
    def read() -> dict[str, mx.array]:
        arrays = {}
        for name in names:
            # Opening reads the header only; an array is read when it is evaluated.
            file = mx.load(str(where[name].path))
            assert isinstance(file, dict)
            arrays[name.rpartition(".")[2]] = file[name]
        return arrays

    return read


def _licence(folder: Path) -> str | None:
    """The licence that the source's own model card names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        lines = file.read(100_000).splitlines()
    if not lines or lines[0] != "---":
        return None
    end = lines.index("---", 1) if "---" in lines[1:] else 0
    found = (line.partition(":")[2] for line in lines[1:end] if line.startswith("license:"))
    return next(found, None)
