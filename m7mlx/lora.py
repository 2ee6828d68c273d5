"""LoRA beside the weights: W x + B A x, so that an adapter can be changed or taken off.

A quantised base stays quantised, and projections that `m7mlx.fuse` has joined stay joined: their
updates share one product with all their A, and each B lies on the rows that are its own. DoRA's
factor for each output follows from W + B A; it is computed once. The last bits differ from those of
merged weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from m7mlx.arrays import dequantize, is_finite
from m7mlx.config import ModelConfig
from m7mlx.errors import InputError, WeightsError
from m7mlx.files.adapters import EMBEDDING, HEAD, Adapter, Changes, find_adapter, read_adapter
from m7mlx.files.hub import resolve
from m7mlx.fuse import FUSED
from m7mlx.model import Mistral
from m7mlx.products import look_up, project
from m7mlx.quantization import Quantization
from m7mlx.terminal import shown


def set_adapter(model: Mistral, adapter: str | Path | None) -> None:
    """Put a LoRA adapter on a loaded model, in place of the one it has; None takes that off.

    adapter  a folder or a Hub repository: mlx-lm's or PEFT's LoRA, rsLoRA or DoRA

    The weights are not touched: without an adapter the model is exactly what it was. A cache, a
    snapshot or a saved cache belongs to the adapter it was made with, and the model refuses it with
    any other; after None, those made without an adapter are good again. If this fails, the model is
    as it was.

    Raises NotFoundError, DownloadError; InputError and WeightsError for an adapter that is damaged,
    not understood or does not fit, or that replaces whole weights other than the embedding's and
    the head's, as full fine-tunes do: `m7mlx-convert --adapter` merges those.
    """
    if adapter is None:
        put_on(model, None, None)
    else:
        put_on(model, open_adapter(adapter, model.config), str(adapter))


def open_adapter(name: str | Path, config: ModelConfig) -> Adapter:
    """An adapter that can be put on a model of this configuration; raises as `set_adapter`."""
    adapter = read_adapter(find_adapter(resolve(name, layout="adapter")), config.tie_word_embeddings)
    changes, shapes = adapter.changes, config.weight_shapes()
    if changes.apart:
        shapes |= {f"{HEAD}.weight": shapes[f"{EMBEDDING}.weight"]}
    for module in {**changes.low, **changes.whole, **changes.base}:
        if f"{module}.weight" not in shapes:
            raise InputError(f"the adapter {adapter.folder} changes {shown(module)}, which is no part of the model")
    for module, stored in [*changes.base.items(), *changes.whole.items()]:
        if module not in (EMBEDDING, HEAD):
            raise InputError(
                f"the adapter {adapter.folder} replaces {shown(module)} as a whole, which only merging can do: "
                f"m7mlx-convert MODEL --adapter {adapter.folder}"
            )
        adapter.check_whole(stored, shapes[f"{EMBEDDING}.weight"])
    for module in changes.low:
        adapter.check(module, shapes[f"{module}.weight"])
    return adapter


def put_on(model: Mistral, adapter: Adapter | None, name: str | None) -> None:
    """Put an opened adapter on the model under this name; None takes off the one it has."""
    if model.exchange is not None:
        raise InputError(
            "a model that is divided among processes takes no adapter; merge it first: m7mlx-convert MODEL --adapter"
        )
    stored = None if adapter is None else _Stored(adapter.changes, _arrays(adapter))
    modules = []
    for place in _places(model):
        module = base_of(place.module) if stored is None else _changed(model, place, stored)
        mx.eval(module.parameters())  # one at a time: what DoRA's gains are computed from is as large as a weight
        modules.append((place, module))
    for place, module in modules:
        place.parent[place.name] = module
    model.changed_by(name)


def base_of(module: nn.Module) -> nn.Module:
    """Return the module that an adapter's module changes; any other module as it is."""
    return module.base if isinstance(module, ChangedLinear | ChangedEmbedding) else module


class ChangedLinear(nn.Module):
    """A projection and its change: {"down": [in, r], "up": [r, out]}, a product beside it.

    DoRA has a "gain" [out] as well, by which the sum is multiplied. A "weight" [out, in] takes the
    place of the base's.
    """

    def __init__(self, base: nn.Module, change: dict[str, mx.array]) -> None:
        super().__init__()
        self.base, self.change = base, change

    def __call__(self, x: mx.array) -> mx.array:  # [B, L, in] → [B, L, out]
        change = self.change
        out = x @ change["weight"].T if "weight" in change else project(x, (self.base,))
        if "up" in change:
            out = out + x @ change["down"] @ change["up"]
        return out * change["gain"] if "gain" in change else out


class ChangedEmbedding(nn.Module):
    """An embedding, and its changes: of how tokens are read, and of how a tied head writes them.

    Each change is {"rows": [vocabulary, r], "columns": [r, hidden]}, for DoRA with a "gain"
    [vocabulary, 1] or [1, hidden], and with a "weight" [vocabulary, hidden] where that takes the
    base's place.
    """

    def __init__(self, base: nn.Module, reading: dict[str, mx.array], writing: dict[str, mx.array]) -> None:
        super().__init__()
        self.base, self.reading, self.writing = base, reading, writing

    def __call__(self, ids: mx.array) -> mx.array:  # [B, L] → [B, L, hidden]
        change = self.reading
        read = change["weight"][ids] if "weight" in change else look_up(ids, self.base, mx.float32)
        if "rows" in change:
            read = read + change["rows"][ids] @ change["columns"]
        if "gain" not in change:
            return read
        return read * (change["gain"][0] if change["gain"].shape[0] == 1 else change["gain"][ids])

    def as_linear(self, x: mx.array) -> mx.array:  # [B, L, hidden] → [B, L, vocabulary]
        """The logits of a tied head."""
        change = self.writing
        if "gain" in change and change["gain"].shape[0] == 1:
            x = x * change["gain"][0]
        out = x @ change["weight"].T if "weight" in change else project(x, (self.base,))
        if "rows" in change:
            out = out + x @ change["columns"].T @ change["rows"].T
        return out * change["gain"][:, 0] if "gain" in change and change["gain"].shape[0] > 1 else out


# --- where it goes --------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A module of the model, its parent, and the modules on disk whose rows it holds, in order."""

    parent: nn.Module
    name: str
    paths: list[str]

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.parent[self.name]
        return module


def _places(model: Mistral) -> Iterator[_Place]:
    for i, block in enumerate(model.model.layers):
        for part, parent in (("self_attn", block.self_attn), ("mlp", block.mlp)):
            for name in list(parent.children()):
                own = FUSED.get(name, (name,))
                yield _Place(parent, name, [f"model.layers.{i}.{part}.{projection}" for projection in own])
    yield _Place(model.model, "embed_tokens", [EMBEDDING])
    if "lm_head" in model:
        yield _Place(model, "lm_head", [HEAD])


class _Stored(NamedTuple):
    """What an adapter changes, and the arrays of its file by name."""

    changes: Changes
    arrays: dict[str, mx.array]


def _arrays(adapter: Adapter) -> dict[str, mx.array]:
    try:
        arrays = mx.load(str(adapter.file))
    except RuntimeError as error:
        raise WeightsError(f"{adapter.file} cannot be read: {error}") from None
    assert isinstance(arrays, dict)
    return arrays


class _Update(NamedTuple):
    """A change of one weight [out, in], in float32: up [out, r], down [r, in], gain, weight."""

    up: mx.array
    down: mx.array
    gain: mx.array | None
    weight: mx.array | None

    def arrays(self, up: str, down: str, dtype: mx.Dtype) -> dict[str, mx.array]:
        """What there is of it, under these names for the two matrices."""
        given = {"weight": self.weight, "gain": self.gain} | ({up: self.up, down: self.down} if self.up.size else {})
        return {kind: mx.contiguous(array.astype(dtype)) for kind, array in given.items() if array is not None}


def _changed(model: Mistral, place: _Place, adapter: _Stored) -> nn.Module:
    """The module of a place with what the adapter does to it."""
    base, dtype = base_of(place.module), model.dtype
    if place.paths == [EMBEDDING]:
        tied = model.config.tie_word_embeddings
        reading = _update(adapter, EMBEDDING, _floats(base))
        writing = _update(adapter, HEAD, _floats(base)) if adapter.changes.apart else reading
        changes = [{} if u is None else u.arrays("rows", "columns", dtype) for u in (reading, writing)]
        return ChangedEmbedding(base, changes[0], changes[1] if tied else {}) if any(changes) else base
    shapes = model.config.weight_shapes()
    sizes = [shapes[f"{path}.weight"][0] for path in place.paths]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    weight = _floats(base)
    updates = [
        _update(adapter, path, weight[start : start + size])
        for path, start, size in zip(place.paths, starts, sizes, strict=True)
    ]
    change = _stack(updates, sizes) if any(updates) else None
    if change is None:
        return base
    down, up = mx.contiguous(change.down.T), mx.contiguous(change.up.T)
    return ChangedLinear(base, change._replace(down=down, up=up).arrays("up", "down", dtype))


def _update(adapter: _Stored, path: str, weight: mx.array) -> _Update | None:
    """What the adapter does to the module at `path`, whose weight is [out, in]."""
    changes = adapter.changes
    low, other = changes.low.get(path), None
    stored = changes.whole.get(path) or changes.base.get(path)
    if stored is not None:
        found = adapter.arrays[stored].astype(mx.float32)
        if not is_finite(found):
            raise WeightsError(f"{stored} holds NaN or infinite numbers; the adapter is damaged")
        if not mx.array_equal(found, weight).item():
            other = weight = found
    if low is None:
        none = mx.zeros((weight.shape[0], 0)), mx.zeros((0, weight.shape[1]))
        return None if other is None else _Update(*none, None, other)
    arrays = {kind: adapter.arrays[name] for kind, name in low.names.items()}
    up, down = low.factors(arrays)
    return _Update(up, down, low.gain(weight + up @ down, arrays) if "m" in arrays else None, other)


def _floats(module: nn.Module) -> mx.array:
    """The weight of a module in float32, quantised or not; MLX computes it when it is used."""
    if "scales" not in module:
        weight: mx.array = module.weight
        return weight.astype(mx.float32)
    scheme = Quantization(module.group_size, module.bits, module.mode)
    return dequantize({kind: module[kind] for kind in ("weight", "scales", "biases") if kind in module}, scheme)


def _stack(updates: list[_Update | None], sizes: list[int]) -> _Update:
    """Join the updates of weights that lie one below the other: each acts on its own rows."""
    given = [update for update in updates if update is not None]
    if len(updates) == len(given) == 1:
        gain = given[0].gain
        return given[0] if gain is None else given[0]._replace(gain=gain.reshape(-1))
    ranks = [0 if update is None else update.up.shape[1] for update in updates]
    rows: list[mx.array] = []
    gains: list[mx.array] = []
    for i, (update, size) in enumerate(zip(updates, sizes, strict=True)):
        before, behind = mx.zeros((size, sum(ranks[:i]))), mx.zeros((size, sum(ranks[i + 1 :])))
        rows.append(mx.concatenate([before, behind] if update is None else [before, update.up, behind], axis=1))
        gains.append(mx.ones((size,)) if update is None or update.gain is None else update.gain.reshape(-1))
    gain = mx.concatenate(gains) if any(update.gain is not None for update in given) else None
    return _Update(mx.concatenate(rows), mx.concatenate([update.down for update in given]), gain, None)
