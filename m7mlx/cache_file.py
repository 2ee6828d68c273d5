"""A cache on disk: one safetensors file, bound to its model, whole or not there at all.

The tensors are the buffers of `LayerRing` as they lie, so that a conversation continues exactly
where it stopped, and can be rolled back as far as before. The header names what they belong to:
model, weights, window, precision, length.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array as int_array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from safetensors import safe_open

from m7mlx.arrays import fingerprint, is_finite, raw_bytes
from m7mlx.cache import RollingCache
from m7mlx.errors import CacheFileError, DiskError, InputError, NotFoundError, WeightsError
from m7mlx.files.disk import sync, sync_path
from m7mlx.files.weights import validate_header
from m7mlx.model import Mistral
from m7mlx.ring import Sinks

_FORMAT = "m7mlx-cache"
_VERSION = 1
_MAX_SLACK = 1 << 16
_TYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32"}
_KINDS = {  # what the fields of a header must be
    **dict.fromkeys(("config_hash", "weight_hash", "dtype"), str),
    **dict.fromkeys(("slack", "sinks", "kv_group_size", "offset", "written"), int),
    **dict.fromkeys(("window", "max_kv_size", "kv_bits"), int | None),
    "metadata": dict,
}


@dataclass(frozen=True)
class CacheHeader:
    """What a saved cache belongs to, and how long it is.

    config_hash      SHA-256 of the model's configuration; weight_hash, of sums over all its weights
    dtype            of unquantised keys and values: "float16", "bfloat16" or "float32"
    offset, written  as in `Positions`
    metadata         the texts that `save_cache` was given

    The other fields are options of `RollingCache`.
    """

    config_hash: str
    weight_hash: str
    dtype: str
    window: int | None
    slack: int
    max_kv_size: int | None
    sinks: int
    kv_bits: int | None
    kv_group_size: int
    offset: int
    written: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class SavedCache:
    """What a saved cache holds, without its keys and values.

    ids           its tokens; none where whoever saved it did not know them
    max_rollback  how many tokens it can be cut back by, once loaded
    metadata      the texts that `save_cache` was given
    """

    ids: Sequence[int]
    max_rollback: int
    metadata: Mapping[str, str]


def save_cache(
    path: str | Path,
    cache: RollingCache,
    model: Mistral,
    metadata: Mapping[str, str] | None = None,
    *,
    weight_hash: str | None = None,
) -> None:
    """Write `cache` to one safetensors file, to be opened by `load_cache` with the same model.

    metadata     texts of your own, kept in the file's header
    weight_hash  as `hash_weights` makes it, if that has been done: it reads all weights

    The file appears under its name only when it is whole, and replaces one that is there already.
    Raises InputError for a cache that is another model's, empty or broken off; DiskError.
    """
    path = Path(path)
    if cache.config != model.config or cache.owner not in (None, model.identity):
        raise InputError("this cache was made for another model, or is older than the change of its adapter")
    if not cache.intact or len(cache.ids) not in (0, cache.offset):
        raise InputError("a forward pass was broken off in this cache; only a whole one can be saved")
    if not cache.offset:
        raise InputError("this cache is empty; there is nothing to save")
    if cache.rings[0].buffers[0].shape[0] != 1:
        raise InputError("a batch is saved row by row")
    metadata = dict(metadata or {})
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise InputError("metadata must be texts by name")
    arrays = _arrays(cache)
    header = json.dumps(asdict(_header(cache, model, metadata, weight_hash or hash_weights(model))))
    about = {"format": _FORMAT, "version": str(_VERSION), "header": header, "sha256": _checksum(header, arrays)}
    partial = path.with_name(f".{path.name}.partial.safetensors")  # one that a kill left is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(partial), arrays, metadata=about)
        validate_header(partial)  # a full disk leaves a short file and no error
        with partial.open("rb+") as file:
            sync(file.fileno())
        partial.replace(path)
        sync_path(path.parent)
    except (OSError, RuntimeError, WeightsError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the disk may be full"
        raise DiskError(f"{path} could not be written: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def load_cache(path: str | Path, model: Mistral, *, weight_hash: str | None = None) -> RollingCache:
    """Open a saved cache: generation continues where it stopped, with nothing to prefill.

    weight_hash  as `hash_weights` makes it, if that has been done: it reads all weights

    Raises NotFoundError; CacheFileError for a file that is damaged, was not saved by m7mlx or by a
    newer one, or belongs to another model.
    """
    path = Path(path)
    about, header = _read_header(path)
    cache = _empty_cache(path, model, header, weight_hash or hash_weights(model))
    _fill(path, cache, _read_arrays(path, cache, model, header, about))
    return cache


def peek_cache(path: str | Path, model: Mistral, *, weight_hash: str | None = None) -> SavedCache:
    """Look at a saved cache without reading its keys and values. Raises as `load_cache`."""
    path = Path(path)
    _, header = _read_header(path)
    cache = _empty_cache(path, model, header, weight_hash or hash_weights(model))
    if _tensors(path).get("ids") is None:
        raise CacheFileError(f"{path} is damaged: it holds no ids for its {header.offset} tokens")
    with safe_open(str(path), framework="np") as file:
        ids = file.get_tensor("ids")
    return SavedCache(int_array("i", ids.astype("i4").tobytes()), cache.max_rollback, header.metadata)


def read_header(path: str | Path) -> CacheHeader:
    """Read what a saved cache belongs to. Raises NotFoundError; CacheFileError, as `load_cache`."""
    return _read_header(Path(path))[1]


def hash_weights(model: Mistral) -> str:
    """Hash sums over all weights, to which a saved cache is bound."""
    return fingerprint(dict(tree_flatten(model.parameters())))


def _empty_cache(path: Path, model: Mistral, header: CacheHeader, weight_hash: str) -> RollingCache:
    """A cache with the options of a saved one, and its length. Raises CacheFileError."""
    if header.config_hash != _config_hash(model):
        raise CacheFileError(f"{path} was saved with a model of another shape; open it with its own model")
    if header.weight_hash != weight_hash:
        raise CacheFileError(f"{path} was saved with other weights of the same shape; open it with its own model")
    try:
        cache = RollingCache(
            model.config,
            header.slack,
            kv_bits=header.kv_bits,
            kv_group_size=header.kv_group_size,
            max_kv_size=header.max_kv_size,
            sinks=header.sinks,
        )
    except InputError as error:
        raise CacheFileError(f"{path} is damaged: {error}") from None
    cache.bind(model.identity, model.config)
    cache.positions = cache.positions.at(header.offset, header.written)
    if header.window != cache.window or not cache.intact:
        raise CacheFileError(f"{path} is damaged: its header contradicts itself")
    return cache


# --- what a file is bound to ----------------------------------------------------------------------


def _header(
    cache: RollingCache,
    model: Mistral,
    metadata: Mapping[str, str],
    weight_hash: str,
) -> CacheHeader:
    return CacheHeader(
        config_hash=_config_hash(model),
        weight_hash=weight_hash,
        dtype=_dtype_name(model),
        window=cache.window,
        slack=cache.slack,
        max_kv_size=cache.max_kv_size,
        sinks=cache.n_sinks,
        kv_bits=cache.format.bits,
        kv_group_size=cache.format.group_size,
        offset=cache.offset,
        written=cache.positions.written,
        metadata=metadata,
    )


def _config_hash(model: Mistral) -> str:
    return hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode()).hexdigest()


def _dtype_name(model: Mistral) -> str:
    return str(model.dtype).removeprefix("mlx.core.")


def _checksum(header: str, arrays: Mapping[str, mx.array]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(arrays):
        digest.update(f"\n{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        if arrays[name].size:
            digest.update(raw_bytes(arrays[name]))
    return digest.hexdigest()


# --- tensors --------------------------------------------------------------------------------------


def _arrays(cache: RollingCache) -> dict[str, mx.array]:
    """Return all there is to save, by name. Slots that were never written are left out."""
    arrays = {"ids": mx.array(cache.ids, dtype=mx.int32)}
    for i, ring in enumerate(cache.rings):
        rows = min(ring.n_slots, cache.positions.written)
        arrays |= {name: a[:, :, :rows] for name, a in zip(_names(cache, i), ring.buffers, strict=True)}
        if ring.sinks is not None:
            arrays |= {f"layers.{i}.sinks.{n}": a for n, a in ring.sinks._asdict().items()}
    mx.eval(arrays)
    return arrays


def _names(cache: RollingCache, layer: int) -> list[str]:
    parts = ["codes", "scales", "biases"] if cache.format.is_packed else ["rows"]
    return [f"layers.{layer}.{kind}.{part}" for kind in ("keys", "values") for part in parts]


def _expected(cache: RollingCache, model: Mistral) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type and shape that every tensor but the ids must have."""
    config, written = cache.config, cache.positions.written
    # What one row of this model looks like when it is stored.
    like = cache.format.encode(mx.zeros((1, config.n_kv_heads, 1, config.head_dim), model.dtype)) * 2
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for i, ring in enumerate(cache.rings):
        rows = min(ring.slots_for(written), written)
        for name, array in zip(_names(cache, i), like, strict=True):
            expected[name] = (_TYPES[array.dtype], (1, config.n_kv_heads, rows, array.shape[3]))
        if n_sinks := cache.positions.spans[ring.kind].n_sinks:
            shape = (1, config.n_kv_heads, n_sinks, config.head_dim)
            expected |= {f"layers.{i}.sinks.{n}": (_TYPES[model.dtype], shape) for n in Sinks._fields}
    return expected


def _read_arrays(
    path: Path, cache: RollingCache, model: Mistral, header: CacheHeader, about: Mapping[str, str]
) -> dict[str, mx.array]:
    """Read the tensors and check all of them. Raises CacheFileError."""
    found = {name: (info.dtype, info.shape) for name, info in _tensors(path).items()}
    expected = _expected(cache, model)
    ids = found.pop("ids", None)
    if ids not in (("I32", (header.offset,)), ("I32", (0,))):
        raise CacheFileError(f"{path} is damaged: it holds no ids for its {header.offset} tokens")
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise CacheFileError(
                f"{path} is damaged: tensor {name} is {_described(found.get(name))}, "
                f"where this model needs {_described(expected.get(name))}"
            )
    try:
        arrays = mx.load(str(path), format="safetensors")
        assert isinstance(arrays, dict)
        mx.eval(arrays)
    except RuntimeError as error:
        raise CacheFileError(f"{path} cannot be read: {error}") from None
    if _checksum(about["header"], arrays) != about.get("sha256"):
        raise CacheFileError(f"{path} is damaged: its checksum does not match")
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and not is_finite(array):
            raise CacheFileError(f"{path} is damaged: {name} holds NaN or infinite numbers")
    tokens = arrays["ids"]
    if tokens.size and not (tokens.min().item() >= 0 and tokens.max().item() < model.config.vocab_size):  # type: ignore[operator]
        raise CacheFileError(f"{path} is damaged: it holds ids outside the model's vocabulary")
    return arrays


def _fill(path: Path, cache: RollingCache, arrays: Mapping[str, mx.array]) -> None:
    for i, ring in enumerate(cache.rings):
        ring.buffers = tuple(arrays[name] for name in _names(cache, i))
        ring.reserve(cache.positions.written, ring.buffers)
        if cache.positions.spans[ring.kind].n_sinks:
            ring.sinks = Sinks(*(arrays[f"layers.{i}.sinks.{n}"] for n in Sinks._fields))
    cache.ids = arrays["ids"].tolist()  # type: ignore[assignment]
    mx.eval(cache.arrays)


def _described(tensor: tuple[str, Iterable[int]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


# --- the header -----------------------------------------------------------------------------------


def _read_header(path: Path) -> tuple[dict[str, str], CacheHeader]:
    """Read the header and check it by itself. Raises NotFoundError, CacheFileError."""
    if not path.is_file():
        raise NotFoundError(f"there is no saved cache {path}")
    _tensors(path)
    with safe_open(str(path), framework="np") as file:
        about: dict[str, str] = file.metadata() or {}
    if about.get("format") != _FORMAT:
        raise CacheFileError(f"{path} is a safetensors file, but not a cache saved by m7mlx")
    version = about.get("version", "")
    if version != str(_VERSION):
        newer = version.isascii() and version.isdigit() and int(version[:9]) > _VERSION
        raise CacheFileError(
            f"{path} was saved by a newer m7mlx (version {version} of the format); update this one"
            if newer
            else f"{path} is damaged: its version is {version[:20]!r}"
        )
    try:
        return about, _parse(json.loads(about["header"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CacheFileError(f"{path} is damaged: its header cannot be read ({error})") from None


def _parse(data: dict[str, Any]) -> CacheHeader:
    """Make a header from its JSON form. Raises ValueError or TypeError for anything else."""
    for name, kind in _KINDS.items():
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise ValueError(f"{name} is {data[name]!r}")
    header = CacheHeader(**data)
    if not (0 <= header.slack <= _MAX_SLACK and 0 < header.offset <= header.written < 1 << 40):
        raise ValueError(f"slack {header.slack}, {header.offset} tokens of {header.written}")
    return header


def _tensors(path: Path) -> dict[str, Any]:
    try:
        return dict(validate_header(path))
    except WeightsError:
        raise CacheFileError(f"{path} is damaged or not a saved cache: not a whole safetensors file") from None
