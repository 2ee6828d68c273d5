"""Quantisers that look at data, by mlx-lm: AWQ, GPTQ, DWQ and dynamic bits.

They hold the whole model in memory, some of them several times. Their result is a source like any
other, which the conversion then writes as it is. Each method imports its own part of mlx-lm, which
is slow to import.
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from m7mlx.arrays import on_cpu
from m7mlx.errors import InputError, RunError
from m7mlx.memory import machine_memory
from m7mlx.quantization import Quantization
from m7mlx.tokens.load import load_tokenizer
from m7mlx.units import counted, in_bytes
from m7mlx_convert.progress import Reporter
from m7mlx_convert.source import Source, Tensor
from m7mlx_convert.text import read_start

Method = Literal["awq", "dwq", "gptq", "dynamic"]
DEFAULT_TOKENS = 16384
_SEQUENCE = 512  # tokens, as in mlx-lm
_DYNAMIC_BPW = 5.0  # mlx-lm's defaults from here on
_EMBED_GROUP, _FALLBACK_BITS, _AWQ_GRID = 32, 6, 20
_DWQ_RATE, _DWQ_BATCH = 1e-6, 4


@dataclass(frozen=True)
class Calibration:
    """A method to quantise by, and its data.

    text        a file; None takes the language reference that comes with every Python
    tokens      how much of it; None takes `DEFAULT_TOKENS`
    target_bpw  for "dynamic": bits a weight on average
    """

    method: Method
    text: Path | None = None
    tokens: int | None = None
    target_bpw: float | None = None


def calibrate(
    source: Source,
    calibration: Calibration,
    scheme: Quantization,
    dtype: mx.Dtype,
    folder: Path,
    reporter: Reporter,
) -> Source:
    """Quantise the source by data.

    dtype   of the scales and of what is not quantised
    folder  where the tokenizer lies

    Raises InputError for what does not fit, RunError where memory or the method fails.
    """
    _check(source, calibration, scheme)
    data = _data(source, calibration, folder)
    quantise = {"awq": _awq, "gptq": _gptq, "dwq": _dwq, "dynamic": _dynamic}[calibration.method]
    model = _mlx_lm_model(source, mx.float32 if on_cpu() else dtype)
    reporter.note(
        f"calibrating ({calibration.method}) with {counted(data.size, 'token')}; the model is held in memory"
    )
    with _mlx_lm_output(reporter):
        try:
            model = quantise(model, source, data, scheme, calibration.target_bpw or _DYNAMIC_BPW)
            mx.eval(model.parameters())
        except (RuntimeError, ValueError) as error:
            raise RunError(f"mlx-lm's {calibration.method} failed ({error}); try more calibration text") from None
    return replace(source, tensors=_list_tensors(model, source, dtype), weight_files=())


def note_calibration(source: Source, calibration: Calibration) -> Source:
    """Add a note to the source of what calibrating will take."""
    needed = memory_needed(source, calibration.method, mx.float16)
    notes = [f"calibrating ({calibration.method}) holds the whole model: about {in_bytes(needed)} of memory"]
    if calibration.method == "dynamic":
        notes.append(f"bits are chosen by module, {calibration.target_bpw or _DYNAMIC_BPW:g} a weight on average")
    return replace(source, notes=(*source.notes, *notes))


def memory_needed(source: Source, method: Method, dtype: mx.Dtype) -> int:
    """Return the bytes that a method takes, about.

    They are copies of the weights; for GPTQ a square matrix for each matrix besides, for dynamic
    bits gradients.
    """
    numbers = sum(tensor.size for tensor in source.tensors.values())
    itemsize = 4 if on_cpu() else dtype.size
    squares = sum(4 * t.shape[1] ** 2 for t in source.tensors.values() if t.is_matrix) if method == "gptq" else 0
    copies = {"awq": 1.3, "gptq": 1.3, "dwq": 2.0, "dynamic": 3.0}[method]
    return int(numbers * itemsize * copies) + squares + (numbers * 4 if method == "dynamic" else 0)


def _check(source: Source, calibration: Calibration, scheme: Quantization) -> None:
    if any(tensor.scheme for tensor in source.tensors.values()):
        raise InputError(f"{source.name} is quantised already; calibrate the model it was made from")
    if calibration.method == "gptq" and scheme.bits not in (2, 4, 8):
        raise InputError(f"mlx-lm's GPTQ has 2, 4 and 8 bits, not {scheme.bits}")
    if calibration.method == "dynamic" and scheme.bits not in (2, 3, 4, 5):
        raise InputError(f"dynamic bits start from 2, 3, 4 or 5 (--q-bits), not {scheme.bits}")
    needed = memory_needed(source, calibration.method, mx.float16)
    if needed > machine_memory():
        raise RunError(
            f"{calibration.method} of {source.name} takes about {in_bytes(needed)} of memory, this machine has "
            f"{in_bytes(machine_memory())}; quantise without --calibrate, or use a larger machine"
        )


def _data(source: Source, calibration: Calibration, folder: Path) -> mx.array:
    """Return token ids [sequences, 512]."""
    tokens = calibration.tokens or DEFAULT_TOKENS
    if calibration.text is None:
        from pydoc_data.topics import topics

        text, name = "\n".join(topics[key] for key in sorted(topics)), "Python's language reference"
    else:
        text, name = read_start(calibration.text, tokens), str(calibration.text)
    ids = load_tokenizer(folder, source.config.vocab_size).encode(text[: tokens * 32])[:tokens]
    if len(ids) < 2 * _SEQUENCE:
        raise InputError(
            f"{name} gives {counted(len(ids), 'token')} to calibrate with; {2 * _SEQUENCE:,} are the least"
        )
    whole = len(ids) // _SEQUENCE * _SEQUENCE
    return mx.array(ids[:whole]).reshape(-1, _SEQUENCE)


def _mlx_lm_model(source: Source, dtype: mx.Dtype) -> Any:
    from mlx_lm.models import llama

    # One class serves the family: sequences to calibrate with are shorter than any window, and than
    # any context beyond which queries are scaled.
    scaling = source.config.rope_scaling
    rope = {"rope_theta": source.config.rope_theta, "rope_scaling": scaling and scaling.to_dict()}
    args = llama.ModelArgs.from_dict({**source.raw_config, "model_type": "llama", "layer_types": None, **rope})
    model = llama.Model(args)
    model.load_weights([(name, tensor.floats().astype(dtype)) for name, tensor in source.tensors.items()])
    mx.eval(model.parameters())
    return model


def _awq(model: Any, source: Source, data: mx.array, scheme: Quantization, target: float) -> Any:
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

    awq_quantize(
        model,
        data,
        AWQ_MODEL_CONFIGS["llama"],
        bits=scheme.bits,
        group_size=scheme.group_size,
        embed_bits=scheme.bits,
        embed_group_size=min(_EMBED_GROUP, scheme.group_size),
        n_grid=_AWQ_GRID,
    )
    return model


def _gptq(model: Any, source: Source, data: mx.array, scheme: Quantization, target: float) -> Any:
    from mlx_lm.quant.gptq import gptq_quantize

    fallback = (max(_FALLBACK_BITS, scheme.bits), scheme.group_size)
    return gptq_quantize(model, data, scheme.bits, scheme.group_size, *fallback)[0]


def _dynamic(model: Any, source: Source, data: mx.array, scheme: Quantization, target: float) -> Any:
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold

    low = (scheme.bits, scheme.group_size)
    high = ({2: 3, 3: 4, 4: 5, 5: 6}[scheme.bits], scheme.group_size)
    sensitivities = dict(estimate_sensitivities(model, data, *low, *high))
    threshold = estimate_threshold(
        model,
        sensitivities,
        target_bpw=target,
        low_bits=low[0],
        low_group_size=low[1],
        high_bits=high[0],
        high_group_size=high[1],
    )

    def predicate(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        is_high = sensitivities[path] > threshold
        return {"bits": (high if is_high else low)[0], "group_size": scheme.group_size}

    nn.quantize(model, class_predicate=predicate)
    return model


def _dwq(model: Any, source: Source, data: mx.array, scheme: Quantization, target: float) -> Any:
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize

    student = copy.deepcopy(model)
    nn.quantize(student, group_size=scheme.group_size, bits=scheme.bits)
    samples = [(row.tolist(), 0) for row in data]  # mlx-lm's pairs of ids and where the loss begins
    batch = min(_DWQ_BATCH, len(samples) // 2)
    valid, train = samples[:batch], samples[batch:]

    def teacher(ids: mx.array, index: int, split: str) -> mx.array:
        logits: mx.array = model(ids)
        return logits

    dwq_quantize(
        student,
        teacher,
        Adam(learning_rate=_DWQ_RATE, bias_correction=True),
        train,
        valid,
        batch_size=batch,
        max_seq_length=_SEQUENCE + 1,
        seed=0,
        dtype=model.model.norm.weight.dtype,
    )
    return student


def _list_tensors(model: nn.Module, source: Source, dtype: mx.Dtype) -> dict[str, Tensor]:
    """Return the parameters of mlx-lm's model by their names on disk, which are ours."""
    modules = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    found = {}
    for name, tensor in source.tensors.items():
        module: Any = modules[name.removesuffix(".weight")]
        scheme = None
        if hasattr(module, "scales"):
            scheme = Quantization(module.group_size, module.bits, module.mode)
        kinds = ("weight", "scales", "biases") if scheme else ("weight",)
        arrays = {kind: module[kind] for kind in kinds}
        for kind, array in arrays.items():
            if mx.issubdtype(array.dtype, mx.floating):
                arrays[kind] = array.astype(dtype)
        mx.eval(arrays)
        found[name] = Tensor(tensor.shape, dtype, partial(dict, arrays), scheme, scheme)
    return found


@contextlib.contextmanager
def _mlx_lm_output(reporter: Reporter) -> Iterator[None]:
    """Keep what mlx-lm prints away from stdout, which is for results."""
    with contextlib.ExitStack() as stack:
        if reporter.style == "text":
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        else:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
