"""Loading a model and its tokenizer from a folder; everything is checked before it is used."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from m7mlx.arrays import dequantize, has_kernels, is_finite, on_cpu
from m7mlx.config import ModelConfig
from m7mlx.cpu import native
from m7mlx.errors import InputError, RunError, WeightsError
from m7mlx.files.checksums import check_folder, is_known_finite, remember_finite
from m7mlx.files.hub import resolve
from m7mlx.files.tied_head import head_as_stored
from m7mlx.files.weights import (
    DTYPES,
    StoredTensor,
    data_starts,
    folder_weights,
    is_left_out,
    parameters,
    read_slices,
)
from m7mlx.fuse import fuse
from m7mlx.lora import open_adapter, put_on
from m7mlx.memory import (
    budget,
    cache_bytes,
    default_kv_bits,
    expands,
    loaded_bytes,
    machine_memory,
    planned_length,
    settle,
)
from m7mlx.model import Mistral
from m7mlx.shard import Shard
from m7mlx.text_tower import VISION_LEFT_OUT, is_vision
from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.units import in_gigabytes

_COMPUTED: dict[str, mx.Dtype] = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def load(
    name: str | Path,
    *,
    dtype: mx.Dtype | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    shard: Shard | None = None,
    adapter_path: str | Path | None = None,
) -> tuple[Mistral, Tokenizer]:
    """Load a model and its tokenizer.

    name          a folder, a GGUF file, a Hub repository ("org/name"), a GGUF file in one
                  ("org/name/file.gguf"), or an alias ("mistral", "demo"); GGUF is converted once,
                  into the cache folder
    dtype         type of activations and unquantised weights, or its name ("float16", "bfloat16",
                  "float32"); None keeps the file's, except on the CPU backend, which emulates
                  16-bit arithmetic: there activations are float32. Weights stay as they lie;
                  without m7mlx's kernels they become float32, quantised ones if they fit into
                  half of the memory
    progress      called with (bytes read, bytes to read)
    shard         read this shard of the model only, for processes that divide it
                  (`m7mlx.parallel.world.World.load`)
    adapter_path  a LoRA adapter to put on the model, as `m7mlx.set_adapter` does; the weights stay
                  as they are

    Use the model on the thread that called this: MLX's streams belong to their thread.

    Raises NotFoundError, DownloadError, ConfigError, WeightsError, TokenizerError; RunError if the
    machine has too little memory.
    """
    folder, config, headers = _checked(name, dtype, shard)
    adapter = None if adapter_path is None else open_adapter(adapter_path, config)
    if adapter is not None and shard is not None:
        raise InputError("a shard of a model takes no adapter; merge it first: m7mlx-convert MODEL --adapter")
    tokenizer = load_tokenizer(folder, config.vocab_size)
    if shard is None:
        model = build(config, _read(headers, progress, maps=_maps(dtype)), dtype)
        if adapter is not None:
            put_on(model, adapter, str(adapter_path))
    else:
        weights = _read_shard(headers, config, shard, progress)
        model = build(shard.config(config), weights, dtype, is_shard=True)
    model.compiles_steps = _wants_compiled_steps()
    return model, tokenizer


def load_model(name: str | Path, *, dtype: mx.Dtype | str | None = None) -> Mistral:
    """Load a model without its tokenizer, which its folder may lack; arguments as for `load`."""
    _, config, headers = _checked(name, dtype)
    model = build(config, _read(headers, maps=_maps(dtype)), dtype)
    model.compiles_steps = _wants_compiled_steps()
    return model


def _wants_compiled_steps() -> bool:
    return os.environ.get("M7MLX_COMPILE", "") in ("1", "on")


def _checked(
    name: str | Path,
    dtype: mx.Dtype | str | None,
    shard: Shard | None = None,
) -> tuple[Path, ModelConfig, dict[str, StoredTensor]]:
    """Return a model's folder, configuration and tensors, checked as far as possible unread."""
    computed = _compute_dtype(dtype)  # refused before anything is fetched or read
    folder = resolve(name)
    config = ModelConfig.from_folder(folder)
    headers = folder_weights(folder)
    check_folder(folder)
    config = head_as_stored(folder, config, headers)
    parameters(folder, config, headers)
    _tell_of_vision(folder, headers)
    headers = {name: stored for name, stored in headers.items() if not is_left_out(name, config)}
    stored = sum(tensor.nbytes for tensor in headers.values())
    if shard is None:
        _check_memory(folder, config, stored, computed)
    else:
        sizes = {n: (t.shape, t.nbytes) for n, t in headers.items()}
        _check_memory(folder, shard.config(config), shard.nbytes(sizes, config), computed)
    return folder, config, headers


def _tell_of_vision(folder: Path, headers: dict[str, StoredTensor]) -> None:
    if any(is_vision(name) for name in headers):
        warnings.warn(f"{folder} {VISION_LEFT_OUT}", stacklevel=4)


def _files(headers: dict[str, StoredTensor]) -> list[Path]:
    return sorted({stored.path for stored in headers.values()})


def build(
    config: ModelConfig,
    weights: dict[str, mx.array],
    dtype: mx.Dtype | str | None = None,
    *,
    is_shard: bool = False,
) -> Mistral:
    """Build a model from its weights.

    weights   by their names on disk; the dictionary is emptied on the way, to save memory
    dtype     as for `load`
    is_shard  the embedding may be missing: other processes have it
    """
    computed = _compute_dtype(dtype)
    expand = config.quantization is not None and expands(config)
    model = Mistral(config)
    if is_shard and "model.embed_tokens.weight" not in weights:
        del model.model["embed_tokens"]
    loaded: dict[str, mx.array] = {}
    for name in list(weights):
        if is_left_out(name, config):
            del weights[name]
        elif name in weights:  # not yet taken together with its module's other arrays
            loaded |= _module_arrays(config, weights, name, computed, expand)
    if config.quantization and not expand:
        nn.quantize(model, class_predicate=lambda path, module: _scheme_of(config, path, loaded))
    model.load_weights(list(loaded.items()), strict=True)
    model.eval()
    fuse(model)
    if has_kernels() and any(array.dtype != mx.float32 for array in loaded.values()):
        model.kv_bits = 16  # as a model of 16 bits or less has on a GPU
    settle()
    return model


def _module_arrays(
    config: ModelConfig,
    weights: dict[str, mx.array],
    name: str,
    dtype: mx.Dtype | None,
    expand: bool,
) -> dict[str, mx.array]:
    """Take the arrays of one module out of `weights`, in the type they are used in."""
    path = name.rsplit(".", 1)[0]
    kinds = [k for k in ("weight", "scales", "biases") if f"{path}.{k}" in weights]
    arrays = {k: weights.pop(f"{path}.{k}") for k in kinds}
    for kind, array in arrays.items():
        # Kernels of ours compute in float32 with matrices as they lie.
        as_it_lies = array.ndim == 2 and dtype == mx.float32 and has_kernels()
        if dtype is not None and mx.issubdtype(array.dtype, mx.floating) and not as_it_lies:
            arrays[kind] = array.astype(dtype)
    scheme = config.quantization.for_module(path) if config.quantization and "scales" in arrays else None
    if expand and scheme:
        arrays = {"weight": dequantize(arrays, scheme).astype(dtype or mx.float32)}
        mx.eval(arrays["weight"])  # now, so that the packed form is freed before the next one
    return {f"{path}.{k}": array for k, array in arrays.items()}


def _scheme_of(config: ModelConfig, path: str, loaded: dict[str, mx.array]) -> bool | dict[str, object]:
    """Tell nn.quantize how the module at `path` is quantised in the file."""
    if f"{path}.scales" not in loaded or config.quantization is None:
        return False
    scheme = config.quantization.for_module(path)
    assert scheme is not None
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": scheme.mode}


def _compute_dtype(asked: mx.Dtype | str | None) -> mx.Dtype | None:
    """Return the type to compute in; None keeps the file's. Raises InputError for what is none."""
    dtype = _COMPUTED.get(asked) if isinstance(asked, str) else asked
    if asked is not None and not (isinstance(dtype, mx.Dtype) and dtype in _COMPUTED.values()):
        raise InputError(f"dtype must be one of {', '.join(_COMPUTED)}, not {asked!r:.100}")
    return mx.float32 if asked is None and on_cpu() else dtype


def _check_memory(folder: Path, config: ModelConfig, stored: int, dtype: mx.Dtype | None) -> None:
    """Raise RunError if the weights and a window of keys and values exceed the memory budget.

    stored  bytes of the weights in files

    On macOS, using more could be a kernel panic.
    """
    weights = loaded_bytes(config, stored) if dtype is None or dtype == mx.float32 else stored
    positions = planned_length(config)
    bits = default_kv_bits(config, stored)
    if dtype is not None and not (dtype == mx.float32 and on_cpu()):  # asked for
        bits = 8 * dtype.size
    cache = cache_bytes(config, positions, bits)
    if weights + cache > budget():
        whose = "this machine has" if budget() == machine_memory() else "the limit is"
        raise RunError(
            f"{folder} needs {in_gigabytes(weights)} for its weights and {in_gigabytes(cache)} for {positions:,} "
            f"tokens, but {whose} {in_gigabytes(budget())}; quantise it: m7mlx-convert {folder} --q-bits 4"
        )


def _maps(dtype: mx.Dtype | str | None) -> bool:
    """Tell whether weights are computed with as they lie, and so can be mapped into memory."""
    return has_kernels() and _compute_dtype(dtype) == mx.float32


def _read(
    headers: dict[str, StoredTensor],
    progress: Callable[[int, int], None] | None = None,
    *,
    maps: bool = False,
) -> dict[str, mx.array]:
    """Read all tensors of a folder, file by file. Raises WeightsError if one is not finite.

    maps  map the files instead: a page of them is read when it is computed with, and memory that
          others need is taken from what was read. That all is finite is remembered for each state
          of a file.
    """
    files = _files(headers)
    total = sum(tensor.nbytes for tensor in headers.values())
    done = 0
    weights: dict[str, mx.array] = {}
    progress = progress or (lambda done, total: None)
    progress(0, total)
    for path in files:
        names = {name: stored for name, stored in headers.items() if stored.path == path}
        try:
            arrays = _mapped(path, names) if maps else _opened(path, names)
        except (RuntimeError, OSError, ValueError) as error:
            raise WeightsError(f"{path} cannot be read: {error}") from None
        known = maps and is_known_finite(path)
        for name in arrays:
            array = arrays[name]
            if not known:
                _check_finite(path, name, array)
            done += array.nbytes
            progress(min(done, total), total)
        if maps and not known:
            remember_finite(path)
        weights |= arrays
    progress(total, total)
    return weights


def _mapped(path: Path, tensors: dict[str, StoredTensor]) -> dict[str, mx.array]:
    starts = data_starts(path)
    parts = [(starts[stored.name], stored.shape, DTYPES[stored.dtype]) for stored in tensors.values()]
    return dict(zip(tensors, native.kernels().map_file(str(path), parts), strict=True))


def _opened(path: Path, tensors: dict[str, StoredTensor]) -> dict[str, mx.array]:
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    return {name: arrays[stored.name] for name, stored in tensors.items()}


def _read_shard(
    headers: dict[str, StoredTensor],
    config: ModelConfig,
    shard: Shard,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, mx.array]:
    """Read the tensors of one shard and nothing else, by the names that its model has for them.

    Raises WeightsError if one is not finite.
    """
    names = {name: own for name in headers if (own := shard.name(name, config)) is not None}
    starts = {path: data_starts(path) for path in _files(headers)}
    weights: dict[str, mx.array] = {}
    for done, (name, own) in enumerate(names.items()):
        if progress:
            progress(done, len(names))
        stored = headers[name]
        weights[own] = read_slices(stored, starts[stored.path][stored.name], shard.slices(name, stored.shape))
        _check_finite(stored.path, name, weights[own])
    if progress:
        progress(len(names), len(names))
    return weights


def _check_finite(path: Path, name: str, array: mx.array) -> None:
    if mx.issubdtype(array.dtype, mx.floating) and not is_finite(array):
        raise WeightsError(f"{path}: {name} holds NaN or infinite numbers; fetch or convert the model again")
