"""Folders of safetensors files: Hugging Face's, mlx-lm's, Mistral's own layout, AWQ, GPTQ, FP8."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError
from m7mlx.files.checksums import MANIFEST, check_folder
from m7mlx.files.tied_head import head_as_stored
from m7mlx.files.weights import DTYPES, StoredTensor, folder_weights, parameters, text_tensors
from m7mlx.jsonfile import read_json
from m7mlx.text_tower import VISION_LEFT_OUT, is_vision
from m7mlx_convert import float8, native, packed
from m7mlx_convert.source import Source, Tensor, check_links, make_reader, named_dtype

# By name, not by pattern: a "tokenizer.bin" may be pickle, a "tokenizer.py" is code.
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v1",
    "tokenizer.model.v2",
    "tokenizer.model.v3",
    "tokenizer.model.v7",
    "tokenizer.model.v7m1",
    "tekken.json",
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
# All that a conversion reads; what lies beside it may lead anywhere.
_READ = (*COPIED, "config.json", "params.json", "README.md", "*.safetensors", "*.index.json", MANIFEST)
# What points to code in the folder; none of it is run here, and none is passed on.
_CODE_KEYS = frozenset({"auto_map", "model_file"})
_QUANTISED_KEYS = frozenset({"quantization", "quantization_config"})


def open_folder(folder: Path, name: str, headers: Mapping[str, StoredTensor] | None = None) -> Source:
    """Open a folder, quantised or not.

    headers  of weights that are not in the folder: they can be planned with, but not read

    Raises ConfigError, WeightsError, InputError for links out of the folder.
    """
    check_links(folder, sorted(path for pattern in _READ for path in folder.glob(pattern)))
    is_native = native.is_native(folder, headers)
    path = _settings(folder)
    given = read_json(path) if path.is_file() else {}
    packing = _find_packing(path, given)
    try:
        config = _read_config(path, given) if packing else ModelConfig.from_folder(folder)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if packing else str(error)) from None
    if headers is None:
        headers = folder_weights(folder, native=is_native)
        check_folder(folder)
    else:
        headers = text_tensors(folder, headers)
    names = (native.NAMES["model.embed_tokens"], native.NAMES["lm_head"]) if is_native else ()
    config = head_as_stored(folder, config, headers, *names)
    whole = _whole_config(given if path.name == "config.json" else {}, config)
    named = named_dtype(whole) or named_dtype(given) or mx.bfloat16
    if is_native:
        tensors = native.list_tensors(folder, config, headers, named)
    elif isinstance(packing, float8.Blocks):
        tensors = float8.list_tensors(folder, config, headers, packing, named)
    elif packing:
        tensors = packed.list_tensors(folder, config, headers, packing)
    else:
        tensors = _list_tensors(folder, config, headers, named)
    return Source(
        name=name,
        config=config,
        raw_config=whole,
        tensors=tensors,
        files={n: _without_code(folder / n) for n in COPIED if (folder / n).is_file()},
        settings={"quantization_config": _packing_settings(given)} if packing else {},
        weight_files=tuple(sorted({stored.path for stored in headers.values()})),
        licence=_licence(folder),
        notes=_notes(headers),
    )


def _settings(folder: Path) -> Path:
    """Return the file that describes the model; Hugging Face's has precedence."""
    own = folder / "params.json"
    return own if own.is_file() and not (folder / "config.json").is_file() else folder / "config.json"


def _packing_settings(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return how a config.json or params.json says that weights are packed, where not by MLX."""
    text = given.get("text_config")
    parts = [given, text if isinstance(text, Mapping) else {}]
    if "dim" in given:  # a params.json
        found = given.get("quantization") or given.get("quantization_config")
    elif any(part.get("quantization") is not None for part in parts):
        return None
    else:
        found = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    return found if isinstance(found, Mapping) else None


def _find_packing(path: Path, given: Mapping[str, Any]) -> float8.Blocks | packed.Packing | None:
    """Return how weights are packed; raises ConfigError for ways that cannot be read."""
    settings = _packing_settings(given)
    if settings is None:
        return None
    return float8.find_blocks(path, settings) or packed.find_packing(path, settings)


def _read_config(path: Path, given: Mapping[str, Any]) -> ModelConfig:
    """Read a model's shape without what is said of its packing."""
    plain = _without_packing(given)
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = _without_packing(text)
    return ModelConfig.from_params(plain) if path.name == "params.json" else ModelConfig.from_dict(plain)


def _without_packing(given: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k not in _QUANTISED_KEYS}


def _notes(headers: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    vision = (f"the model {VISION_LEFT_OUT}",) if any(is_vision(name) for name in headers) else ()
    return vision + float8.list_notes(headers)


def _list_tensors(
    folder: Path,
    config: ModelConfig,
    headers: Mapping[str, StoredTensor],
    named: mx.Dtype,
) -> dict[str, Tensor]:
    """Return the parameters of Hugging Face's layout or mlx-lm's, by name.

    named  the type that config.json names
    """
    found = {}
    found_parts = parameters(folder, config, headers)
    shapes = config.weight_shapes()
    for name, (scheme, parts) in found_parts.items():
        module = name.removesuffix(".weight")
        read = make_reader(headers, {kind: f"{module}.{kind}" for kind in parts})
        stored = DTYPES[parts["scales" if scheme else "weight"].dtype]
        dtype = named if stored == mx.uint8 else stored  # mxfp4 and its kin have scales of 8 bits
        found[name] = Tensor(shapes[name], dtype, read, scheme, scheme)
    return found


def _whole_config(given: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return the source's config.json with defaults written out, tied as the weights are.

    Readers differ in their defaults: mlx-lm ties the head where tie_word_embeddings is absent, and
    does not look for RoPE's base in rope_parameters. Of a model that wraps a text model, the text
    model's is returned.
    """
    if isinstance(text := given.get("text_config"), Mapping):
        given = {key: given[key] for key in ("torch_dtype", "dtype") if key in given} | dict(text)
        given["architectures"] = config.to_dict()["architectures"]
    may_be_null = {"sliding_window", "bos_token_id", "eos_token_id"}
    absent = {
        k: v for k, v in config.to_dict().items() if given.get(k) is None and (k not in given or k not in may_be_null)
    }
    whole = dict(given) | absent | {"tie_word_embeddings": config.tie_word_embeddings}
    return {k: v for k, v in whole.items() if k not in _CODE_KEYS | _QUANTISED_KEYS}


def _without_code(path: Path) -> Path | bytes:
    """Return the file, or its content where keys that point to code had to be taken out."""
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


def _licence(folder: Path) -> str | None:
    """Return the licence that the source's own model card names."""
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
