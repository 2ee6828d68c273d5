"""The road of a conversion: open the source, plan every tensor, then read, quantise and write one at a time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from m7mlx.config import Quantization
from m7mlx.errors import InputError, TokenizerError, WeightsError
from m7mlx.hub import resolve
from m7mlx.tokenizer import load_tokenizer
from m7mlx_convert.card import model_card
from m7mlx_convert.output import check_space, check_target, whole_folder
from m7mlx_convert.source import Source, Tensor, open_source
from m7mlx_convert.writer import ShardWriter, Spec

_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True)
class Step:
    """What becomes of one parameter: kept as it is, cast, or quantised."""

    name: str
    tensor: Tensor
    dtype: mx.Dtype  # of the weight, or of scales and biases
    scheme: Quantization | None

    def specs(self) -> list[Spec]:
        """The tensors this gives, in the order they are written."""
        if self.scheme is None:
            return [Spec(self.name, self.dtype, self.tensor.shape)]
        rows, columns = self.tensor.shape
        module = self.name.removesuffix(".weight")
        groups = (rows, columns // self.scheme.group_size)
        return [
            Spec(self.name, mx.uint32, (rows, columns * self.scheme.bits // 32)),
            Spec(f"{module}.scales", self.dtype, groups),
            Spec(f"{module}.biases", self.dtype, groups),
        ]

    def arrays(self) -> Iterator[mx.array]:
        """The arrays for `specs`. Raises WeightsError for NaN and infinite numbers."""
        loaded = self.tensor.load()
        for kind, array in loaded.items():
            if mx.issubdtype(array.dtype, mx.floating):
                loaded[kind] = array.astype(self.dtype)
                if not mx.isfinite(loaded[kind]).all().item():
                    raise WeightsError(
                        f"{self.name} holds NaN or infinite numbers; the source is damaged, or its numbers are too "
                        "large for float16 (then give --dtype bfloat16)"
                    )
        if self.scheme and self.tensor.scheme is None:
            scheme = self.scheme
            yield from mx.quantize(loaded["weight"], group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode)
        else:
            yield from (loaded[kind] for kind in ("weight", "scales", "biases") if kind in loaded)


def convert(
    source: str,
    mlx_path: str | Path | None = None,
    *,
    quantization: Quantization | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: bool = False,
    command: Sequence[str] = (),
) -> Path:
    """Convert `source` (Hub repository, folder or GGUF file) and return the folder written.

    quantization  scheme for every linear layer and the embedding; None keeps the source's numbers
    dtype         type of what is not quantised; None takes the config's, else the file's
    Raises InputError and its kin before anything is written; DiskError, WeightsError on the way.
    """
    path = resolve(source, revision)
    name = path.stem if path.is_file() else source.rstrip("/").rsplit("/", 1)[-1] or path.name
    target = Path(mlx_path) if mlx_path else Path(f"{name}-{quantization.bits}bit" if quantization else f"{name}-mlx")
    check_target(target, path, force)
    opened = open_source(path, name)
    for note in opened.notes:
        print(f"note: {note}", file=sys.stderr)
    steps = plan(opened, quantization, dtype)
    specs = [spec for step in steps for spec in step.specs()]
    check_space(target, sum(spec.nbytes for spec in specs))
    with whole_folder(target) as work:
        _write_files(work, opened, steps, source, command)
        _check_tokenizer(work, opened)
        _write_weights(work, steps, specs, progress)
    return target


def plan(source: Source, quantization: Quantization | None, dtype: str | None) -> list[Step]:
    """What to do with each tensor. Raises InputError where the scheme does not fit."""
    asked = dtype or source.raw_config.get("dtype") or source.raw_config.get("torch_dtype")
    steps = []
    for name, tensor in source.tensors.items():
        if tensor.scheme and quantization:
            raise InputError(
                f"{source.name} is quantised already ({tensor.scheme.bits} bits); "
                "quantise from the original weights, or leave out --q-bits to keep it as it is"
            )
        scheme = tensor.scheme or (quantization if len(tensor.shape) == 2 else None)
        if scheme and tensor.shape[-1] % scheme.group_size:
            fits = [str(g) for g in (32, 64, 128) if all(t.shape[-1] % g == 0 for t in source.tensors.values())]
            mend = f"use --q-group-size {' or '.join(fits)}" if fits else "no group size fits this model"
            raise InputError(
                f"{name} has {tensor.shape[-1]} columns, which groups of {scheme.group_size} do not divide; {mend}"
            )
        steps.append(Step(name, tensor, _DTYPES.get(str(asked), tensor.dtype), scheme))
    return steps


def config_of(source: Source, steps: Sequence[Step]) -> dict[str, Any]:
    """config.json of the result: the source's, with `quantization` as mlx-lm writes it."""
    config = dict(source.raw_config)
    schemes = {step.name.removesuffix(".weight"): step.scheme for step in steps if len(step.tensor.shape) == 2}
    used = [scheme for scheme in schemes.values() if scheme]
    if used:
        base = max(used, key=used.count)
        overrides = {path: scheme for path, scheme in schemes.items() if scheme != base}
        written = Quantization(base.group_size, base.bits, base.mode, overrides).to_dict()
        config |= {"quantization": written, "quantization_config": written}
    return config


def _write_files(work: Path, source: Source, steps: Sequence[Step], origin: str, command: Sequence[str]) -> None:
    for name, content in source.files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, work / name)
        else:
            (work / name).write_bytes(content)
    config = config_of(source, steps)
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    card = model_card(source, origin, config.get("quantization"), command)
    (work / "README.md").write_text(card, encoding="utf-8")


def _check_tokenizer(work: Path, source: Source) -> None:
    size = load_tokenizer(work).vocab_size
    if size > source.config.vocab_size:
        raise TokenizerError(
            f"the tokenizer of {source.name} has {size} tokens but the model's embedding only "
            f"{source.config.vocab_size}; they do not belong together"
        )


def _write_weights(work: Path, steps: Sequence[Step], specs: Sequence[Spec], progress: bool) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    writer = ShardWriter(work, specs)
    columns = (TextColumn("Converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        with Progress(*columns, console=console, disable=not progress, transient=True) as bar:
            task = bar.add_task("", total=sum(spec.nbytes for spec in specs))
            for step in steps:
                for spec, array in zip(step.specs(), step.arrays(), strict=True):
                    writer.write(spec.name, array)
                    bar.advance(task, spec.nbytes)
                mx.clear_cache()  # MLX would keep every freed buffer for reuse
        writer.finish()
    finally:
        writer.close()
