"""LoRA adapters, mlx-lm's and PEFT's, merged into the weights: W + scale · B A.

DoRA rescales the rows of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx.files.adapters import EMBEDDING, HEAD, SETTINGS, Low, find_adapter, read_adapter
from m7mlx.files.weights import StoredTensor
from m7mlx.terminal import shown
from m7mlx_convert.source import Arrays, Source, Tensor, check_links, make_reader


def merge_adapter(source: Source, folder: Path) -> Source:
    """Merge the adapter in `folder` into the source. Raises InputError and its kin."""
    file = find_adapter(folder)
    check_links(folder, (file, folder / SETTINGS))
    adapter = read_adapter(file, source.config.tie_word_embeddings)
    changes, headers = adapter.changes, adapter.headers
    notes = list(source.notes)
    if changes.apart:
        source = _untied(source)
        notes.append("the adapter changes embedding and head apart: the result is not tied any more")
    tensors = dict(source.tensors)
    changed = dict.fromkeys([*changes.base, *changes.whole, *changes.low])
    for module in changed:
        name = f"{module}.weight"
        if name not in tensors:
            raise InputError(f"the adapter {folder} changes {shown(module)}, which is not a part of {source.name}")
        for stored in (changes.base.get(module), changes.whole.get(module)):
            if stored is not None:
                adapter.check_whole(stored, tensors[name].shape)
                read = make_reader(headers, {"weight": stored})
                tensors[name] = replace(tensors[name], read=read, scheme=None)
        if low := changes.low.get(module):
            adapter.check(module, tensors[name].shape)
            tensors[name] = _merged(tensors[name], low, headers)
    notes.append(f"the adapter {shown(folder.resolve().name)} changes {len(changed)} of {len(tensors)} parameters")
    files = (*source.weight_files, file) if source.weight_files else ()
    return replace(
        source,
        tensors=tensors,
        weight_files=files,
        settings={**source.settings, "adapter": adapter.settings},
        notes=tuple(notes),
    )


def _untied(source: Source) -> Source:
    """Give the model a head of its own, which is the embedding still."""
    return replace(
        source,
        config=replace(source.config, tie_word_embeddings=False),
        raw_config={**source.raw_config, "tie_word_embeddings": False},
        tensors={**source.tensors, f"{HEAD}.weight": source.tensors[f"{EMBEDDING}.weight"]},
    )


def _merged(tensor: Tensor, low: Low, headers: Mapping[str, StoredTensor]) -> Tensor:
    """Return the tensor with a low-rank update merged into it when it is read."""
    read_update = make_reader(headers, low.names)

    def read() -> Arrays:
        return {"weight": low.merge(tensor.floats(), read_update()).astype(tensor.dtype)}

    return replace(tensor, read=read, scheme=None)
