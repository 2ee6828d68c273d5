"""The plan of a conversion, from headers alone: each tensor's scheme, the result's size, memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from m7mlx.arrays import is_finite, on_cpu
from m7mlx.errors import InputError, WeightsError
from m7mlx.files.patterns import match_patterns
from m7mlx.memory import UNDO_SLACK, footprints
from m7mlx.quantization import Quantization
from m7mlx.units import counted, in_bytes
from m7mlx_convert.scheme import Recipe
from m7mlx_convert.source import FLOATS, Source, Tensor, named_dtype
from m7mlx_convert.writer import Spec, stored_specs

if TYPE_CHECKING:
    from rich.console import RenderableType

# Bytes of tensors that are read, quantised and written at one time, unless one alone is larger.
IN_FLIGHT = 600_000_000
_BASE = 250_000_000  # bytes of memory that Python and MLX take
_SLICE = 1 << 18  # numbers that are quantised at a time where that takes a table
# Bytes a number: MLX's CPU backend compares each with every code there is.
_TABLES = {"mxfp4": 78, "mxfp8": 10, "nvfp4": 78}


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter and what becomes of it: kept as it is, cast, expanded or quantised.

    dtype   of the weight; of one that is quantised, of its scales where they are floats
    scheme  of the result
    """

    name: str
    tensor: Tensor
    dtype: mx.Dtype
    scheme: Quantization | None

    @cached_property
    def specs(self) -> list[Spec]:
        """The tensors that it is stored as, in the order in which they are written."""
        return stored_specs(self.name, self.tensor.shape, self.dtype, self.scheme)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the result."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def memory(self) -> int:
        """Bytes that `arrays` takes, about; what changes passes through float32 or its own type."""
        is_read_plain = self.tensor.scheme is None and not self.tensor.is_widened
        around = self.tensor.size * (self.tensor.dtype.size if is_read_plain else 4 + 1)
        if self.scheme != self.tensor.scheme and (table := _table(self.scheme)):
            around += self.nbytes + min(self.tensor.size, _SLICE) * table
        return self.nbytes + around

    def arrays(self) -> Iterator[mx.array]:
        """Compute the arrays for `specs`. Raises WeightsError for NaN and infinite numbers."""
        if self.scheme == self.tensor.scheme:
            for array in self.tensor.read().values():
                yield self._finite(array) if mx.issubdtype(array.dtype, mx.floating) else array
            return
        weight = self._finite(self.tensor.floats())
        if self.scheme is None:
            yield weight
            return
        yield from _quantized(weight, self.scheme)

    def _finite(self, array: mx.array) -> mx.array:
        """Cast an array to `dtype`. Raises WeightsError where numbers are not finite then."""
        cast = array.astype(self.dtype)
        if not is_finite(cast):
            if is_finite(array):
                raise WeightsError(f"{self.name} holds numbers too large for {self.dtype}; give another --dtype")
            raise WeightsError(f"{self.name} holds NaN or infinite numbers; the source is damaged")
        return cast


def _table(scheme: Quantization | None) -> int:
    """Return the bytes a number that quantising takes besides what goes in and comes out."""
    return _TABLES.get(scheme.mode, 0) if scheme and on_cpu() else 0


def _quantized(weight: mx.array, scheme: Quantization) -> list[mx.array]:
    """Quantise, some rows at a time where that takes many times the memory of the weight."""
    rows = max(1, _SLICE // weight.shape[1]) if _table(scheme) else weight.shape[0]
    done: list[list[mx.array]] = []
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        done.append(list(mx.quantize(part, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode)))
        mx.eval(done[-1])
    return [mx.concatenate(list(parts)) for parts in zip(*done, strict=True)] if len(done) > 1 else done[0]


@dataclass(frozen=True)
class Plan:
    """A conversion, ready to run.

    parameters  in the order in which they are written
    config      config.json of the result
    """

    source: Source
    parameters: Sequence[PlannedParameter]
    config: Mapping[str, Any]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the result's weights."""
        return sum(planned.nbytes for planned in self.parameters)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the result over the source's numbers."""
        return 8 * self.nbytes / sum(planned.tensor.size for planned in self.parameters)

    @property
    def memory(self) -> int:
        """Bytes of memory that the conversion takes, about."""
        return _BASE + max(max(planned.memory for planned in self.parameters), min(IN_FLIGHT, self.nbytes))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user, a line each."""
        again = any(
            planned.tensor.default and planned.scheme not in (None, planned.tensor.default)
            for planned in self.parameters
        )
        return self.source.notes + (
            ("the weights are quantised already and are quantised again: the losses add up",) if again else ()
        )

    @cached_property
    def key(self) -> str | None:
        """A hash of all that decides the result; None if the source cannot be read twice.

        Two runs with the same key write the same bytes: the second can resume where the first was
        killed.
        """
        if not self.source.weight_files:
            return None
        made_by = [f"{name} {version(name)}" for name in ("m7mlx", "mlx", "numpy", "gguf")]
        decided = [made_by, f"{mx.default_device()}", self.config, self.source.settings]
        digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode())
        for file in self.source.weight_files:
            state = file.stat()
            digest.update(f"\n{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
        for planned in self.parameters:
            digest.update(f"\n{planned.specs} {planned.tensor.scheme} {planned.scheme}".encode())
        return digest.hexdigest()

    def describe(self, target: Path) -> dict[str, Any]:
        """Return the plan as `--json` prints it; sizes in bytes."""
        return {
            "source": self.source.name,
            "target": str(target),
            "groups": self._groups(),
            "parameters": sum(planned.tensor.size for planned in self.parameters),
            "bits_per_weight": round(self.bits_per_weight, 3),
            "result_bytes": self.nbytes,
            "disk_free_bytes": shutil.disk_usage(target.parent).free,
            "conversion_memory_bytes": self.memory,
            "chat_memory": [chat.to_dict() for chat in footprints(self.source.config, self.nbytes, UNDO_SLACK)],
            "notes": list(self.notes),
        }

    def _groups(self) -> list[dict[str, Any]]:
        """Sum up what is alike in all layers."""
        groups: dict[tuple[str, str], list[PlannedParameter]] = {}
        for planned in self.parameters:
            part = planned.name.removesuffix(".weight").split(".", 3)[-1].removeprefix("model.")
            groups.setdefault((part, stored_as(planned.scheme, planned.dtype)), []).append(planned)
        return [
            {
                "part": part,
                "stored": stored,
                "tensors": len(parameters),
                "parameters": (size := sum(planned.tensor.size for planned in parameters)),
                "bits_per_weight": round(8 * sum(planned.nbytes for planned in parameters) / size, 3),
                "bytes": sum(planned.nbytes for planned in parameters),
            }
            for (part, stored), parameters in groups.items()
        ]


def make_plan(source: Source, recipe: Recipe, dtype: str | None) -> Plan:
    """Plan what becomes of each tensor.

    dtype  of what is not quantised and of the scales; None takes the source's

    Raises InputError where the recipe does not fit the source.
    """
    config = source.config
    asked = FLOATS[dtype] if dtype else (named_dtype(source.raw_config) if recipe.quantises else None)
    matrices = [name.removesuffix(".weight") for name, tensor in source.tensors.items() if tensor.is_matrix]
    ruled = match_patterns([rule.pattern.pattern for rule in recipe.rules], matrices)
    rules = {module: recipe.rules[found[0]] for module, found in zip(matrices, ruled, strict=True) if found}
    for i, rule in enumerate(recipe.rules):
        if not any(i in found for found in ruled):
            raise InputError(
                f"the rule {rule.pattern.pattern!r} matches nothing; a name is {matrices[1]}, for example"
            )
    planned = []
    for name, tensor in source.tensors.items():
        scheme = None
        if tensor.is_matrix:
            module = name.removesuffix(".weight")
            scheme = recipe.scheme(module, config.n_layers, tensor.default, rules.get(module))
        if scheme and tensor.shape[-1] % scheme.group_size:
            raise InputError(
                f"{name} has {tensor.shape[-1]} columns, which groups of {scheme.group_size} do not divide; "
                + _fitting_groups(source)
            )
        is_kept = scheme is not None and scheme == tensor.scheme
        if is_kept and dtype and asked != tensor.dtype:
            raise InputError(
                f"{source.name} is quantised, with scales that --dtype {dtype} would change; leave out --dtype"
            )
        target = tensor.dtype if is_kept or asked is None else asked
        planned.append(PlannedParameter(name, tensor, target, scheme))
    return Plan(source, planned, _result_config(source, planned, dtype))


def _fitting_groups(source: Source) -> str:
    """Return the advice for a group size that does not fit."""
    columns = [tensor.shape[-1] for tensor in source.tensors.values() if tensor.is_matrix]
    fits = [str(group) for group in (32, 64, 128) if all(n % group == 0 for n in columns)]
    return f"use --q-group-size {' or '.join(fits)}" if fits else "no group size fits this model: leave out --q-bits"


def _result_config(source: Source, parameters: Sequence[PlannedParameter], dtype: str | None) -> dict[str, Any]:
    """Return the source's config.json, with `quantization` as mlx-lm writes it."""
    config = dict(source.raw_config)
    if dtype:
        config |= {key: dtype for key in ("torch_dtype", "dtype") if key in config}
    schemes = {
        planned.name.removesuffix(".weight"): planned.scheme for planned in parameters if planned.tensor.is_matrix
    }
    used = [scheme for scheme in schemes.values() if scheme]
    if used:
        base = max(used, key=used.count)
        overrides = {path: scheme for path, scheme in schemes.items() if scheme != base}
        written = Quantization(base.group_size, base.bits, base.mode, overrides).to_dict()
        config |= {"quantization": written, "quantization_config": written}
    return config


def stored_as(scheme: Quantization | None, dtype: mx.Dtype) -> str:
    """Describe how a tensor is stored: "4 bits, groups of 64", "mxfp4", "bfloat16"."""
    if scheme is None:
        return str(dtype).removeprefix("mlx.core.")
    return f"{scheme.bits} bits, groups of {scheme.group_size}" if scheme.mode == "affine" else scheme.mode


def plan_table(plan: Plan, target: Path) -> RenderableType:
    """Write the plan for people."""
    # A conversion does without these.
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    data = plan.describe(target)
    table = Table(title=Text(f"{data['source']} → {target}"), title_justify="left", box=None, pad_edge=False)
    for heading, justify in (("part", "left"), ("tensors", "right"), ("stored as", "left")):
        table.add_column(heading, justify="right" if justify == "right" else "left")
    table.add_column("bits/weight", justify="right")
    table.add_column("size", justify="right")
    for group in data["groups"]:
        bits = f"{group['bits_per_weight']:.2f}"
        table.add_row(group["part"], str(group["tensors"]), group["stored"], bits, in_bytes(group["bytes"]))
    lines = [
        f"result    {in_bytes(data['result_bytes'])}, {plan.bits_per_weight:.2f} bits a weight; "
        f"{in_bytes(data['disk_free_bytes'])} free on the disk",
        f"to make   about {in_bytes(data['conversion_memory_bytes'])} of memory",
    ]
    for chat in data["chat_memory"]:
        for bits, cache in chat["cache_bytes"].items():
            at = (
                f"window of {chat['tokens']:,}, for any length"
                if chat["is_window"]
                else counted(chat["tokens"], "token")
            )
            whole = in_bytes(chat["weights_bytes"] + cache + chat["other_bytes"])
            lines.append(f"to chat   {whole} with {bits} a key or value ({at}), on this machine")
    lines += [f"note      {note}" for note in plan.notes]
    return Group(table, Text("\n" + "\n".join(lines)))
