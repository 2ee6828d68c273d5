"""The weights of a model, from headers and configuration alone."""

from __future__ import annotations

import math
import shlex

from m7mlx.config import ModelConfig
from m7mlx.errors import NotFoundError
from m7mlx.files.hub import find_local, is_gguf
from m7mlx.files.published import PUBLISHED
from m7mlx.files.tied_head import head_as_stored
from m7mlx.files.weights import folder_weights, is_left_out, parameters, refuse_adapter
from m7mlx.jsonfile import said
from m7mlx.terminal import one_line

Tensors = dict[str, tuple[tuple[int, ...], int]]  # name → shape, bytes


def list_weights(name: str, bits: int | None) -> tuple[ModelConfig, Tensors]:
    """Return the configuration and the tensors of a model on this machine, or of one with an alias.

    bits  of each weight, whatever the files hold; None takes the files' own

    Raises NotFoundError, ConfigError, WeightsError.
    """
    folder = find_local(name)
    if folder is not None and folder.is_dir():
        refuse_adapter(folder)
        config = ModelConfig.from_folder(folder)
        if bits is None:
            found = folder_weights(folder)
            config = head_as_stored(folder, config, found)
            parameters(folder, config, found)
            headers = {n: t for n, t in found.items() if not is_left_out(n, config)}
            return config, {n: (t.shape, t.nbytes) for n, t in headers.items()}
    elif folder is not None or is_gguf(name):
        raise NotFoundError(
            f"{said(name)} is no model folder, which a plan reads; make one of a GGUF file: "
            f"m7mlx-convert {shlex.quote(one_line(name))}"
        )
    elif name in PUBLISHED:
        config = PUBLISHED[name].config
    else:
        raise NotFoundError(
            f"{said(name)} is not on this machine, and a plan fetches nothing; take a folder, or mistral"
        )
    width = (bits or 4) + (0.5 if (bits or 4) < 16 else 0)  # scales and biases, in groups of 64
    shapes = config.weight_shapes().items()
    return config, {n: (s, int(math.prod(s) * (width if len(s) == 2 else 16) / 8)) for n, s in shapes}
