"""A model's folder as a GGUF file of the same numbers: what llama.cpp is measured on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind

from m7mlx.config import ModelConfig
from m7mlx.errors import InputError
from m7mlx.files.weights import Parameter, data_starts, folder_weights, parameters, read_slices
from m7mlx_bench.gguf_blocks import choose_type, pack

_FLOATS = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}


class _Tensor(NamedTuple):
    """A tensor of the file to be written.

    name    in the file
    module  its path in the model, "lm_head"
    heads   the rows of so many heads change their order; 0 for no other order
    """

    name: str
    module: str
    kind: Kind
    shape: tuple[int, ...]
    heads: int

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        numbers, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // numbers * size


def write_gguf(
    folder: Path,
    file: Path,
    advance: Callable[[float], None] = lambda share: None,
) -> str:
    """Write the model in `folder` as a GGUF file without a tokenizer.

    Returns the types of its matrices, "Q4_0". `advance` is called with the share that is written.
    Raises InputError where no type of GGUF holds the numbers.
    """
    weights = _Weights(folder)
    tensors = weights.plan()
    writer = gguf.GGUFWriter(file, "llama")
    _add_metadata(writer, weights.config)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
    done, total = 0, sum(tensor.nbytes for tensor in tensors)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_interleave(weights.numbers(tensor), tensor.heads))
            done += tensor.nbytes
            advance(done / total)
    finally:
        writer.close()
    return ", ".join(dict.fromkeys(tensor.kind.name for tensor in tensors if len(tensor.shape) > 1))


def _add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


class _Weights:
    """The weights of a folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.config = ModelConfig.from_folder(folder)
        headers = folder_weights(folder)
        self._parameters = parameters(folder, self.config, headers)
        self._starts = {path: data_starts(path) for path in {stored.path for stored in headers.values()}}

    def plan(self) -> list[_Tensor]:
        """List the tensors of the file, with the types that hold them. Raises InputError."""
        config = self.config
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}
        found = []
        for parameter, shape in config.weight_shapes().items():
            module = parameter.removesuffix(".weight")
            name = f"{names.get_name(module)}.weight"
            found.append(_Tensor(name, module, self._kind(module, shape), shape, heads.get(module.split(".")[-1], 0)))
        return found

    def numbers(self, tensor: _Tensor) -> Any:
        """Return a tensor's numbers as the file holds them, [rows, …]."""
        parameter = self._parameter(tensor.module)
        weight = self._read(tensor.module, "weight")
        if parameter.scheme:
            scales, biases = self._scales(tensor.module)
            return pack(tensor.kind, parameter.scheme, np.array(weight), scales, biases)
        if tensor.kind is Kind.F32:
            weight = weight.astype(mx.float32)
        return np.array(weight.view(mx.uint16) if weight.dtype == mx.bfloat16 else weight)

    def _kind(self, module: str, shape: tuple[int, ...]) -> Kind:
        scheme = self._parameter(module).scheme
        if len(shape) == 1:
            return Kind.F32  # as llama.cpp wants norms
        if scheme is None:
            return _FLOATS[self._parameter(module).parts["weight"].dtype]
        if scheme.mode != "affine":
            raise InputError(f"weights in {scheme.mode} are not copied into a GGUF file; give one with --gguf")
        return choose_type(scheme, shape[1], *self._scales(module))

    def _parameter(self, module: str) -> Parameter:
        return self._parameters[f"{module}.weight"]

    def _scales(self, module: str) -> tuple[Any, Any]:
        scales, biases = (self._read(module, part).astype(mx.float32) for part in ("scales", "biases"))
        return np.array(scales), np.array(biases)

    def _read(self, module: str, part: str) -> mx.array:
        stored = self._parameter(module).parts[part]
        return read_slices(stored, self._starts[stored.path][stored.name], (slice(None),))


def _interleave(rows: Any, heads: int) -> Any:
    """Put the rows of each head into the order of llama.cpp, which rotates neighbours.

    Hugging Face's order rotates row i with row i + head_dim / 2.
    """
    if not heads:
        return rows
    return np.ascontiguousarray(rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2)).reshape(rows.shape)
