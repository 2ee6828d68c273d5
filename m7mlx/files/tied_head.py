"""A head that is stored beside an embedding that it is said to be tied to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from m7mlx.config import ModelConfig
from m7mlx.errors import WeightsError
from m7mlx.files.weights import DTYPES, StoredTensor, data_starts, read_slices

_ROWS = 1024  # of two matrices that are compared


def head_as_stored(
    folder: Path,
    config: ModelConfig,
    headers: Mapping[str, StoredTensor],
    embedding: str = "model.embed_tokens",
    head: str = "lm_head",
) -> ModelConfig:
    """Return the config, untied if the files hold a head that differs from the embedding.

    embedding, head  what the files call the two

    Such a head is the model's own, whatever config.json says of tying; transformers reads such
    files in the same way (`tie_weights`). A head in a file that is not on this machine counts as
    different. Raises WeightsError where there is a head but no embedding to tie it to.
    """
    own = {name.removeprefix(f"{head}."): t for name, t in headers.items() if name.startswith(f"{head}.")}
    tied = {n.removeprefix(f"{embedding}."): t for n, t in headers.items() if n.startswith(f"{embedding}.")}
    if not config.tie_word_embeddings or not own:
        return config
    if not tied:
        raise WeightsError(
            f"{folder} has {head} but not {embedding}, which is tied to it: they were saved without the second "
            "name; save it again with transformers' save_pretrained"
        )
    same = own.keys() == tied.keys() and all(_is_equal(own[kind], tied[kind]) for kind in own)
    return config if same else replace(config, tie_word_embeddings=False)


def _is_equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers. Reads a few rows of each at a time."""
    if a.shape != b.shape or len(a.shape) != 2 or 0 in a.shape or {a.dtype, b.dtype} - DTYPES.keys():
        return False
    if not (a.path.is_file() and b.path.is_file()):
        return False
    starts = data_starts(a.path)[a.name], data_starts(b.path)[b.name]
    for row in range(0, a.shape[0], _ROWS):
        rows = (slice(row, row + _ROWS),)
        x, y = read_slices(a, starts[0], rows), read_slices(b, starts[1], rows)
        if not mx.array_equal(x, y if a.dtype == b.dtype else y.astype(x.dtype)).item():
            return False
    return True
