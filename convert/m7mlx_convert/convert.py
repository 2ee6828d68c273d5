"""The road of a conversion: open the source, plan every tensor, then read, quantise and write one at a time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from m7mlx.arrays import is_finite
from m7mlx.errors import InputError, TokenizerError, WeightsError
from m7mlx.hub import ALIASES, DEMO, resolve
from m7mlx.quantization import Quantization
from m7mlx.tokenizer import load_tokenizer
from m7mlx_convert.card import model_card
from m7mlx_convert.output import check_apart, check_space, check_target, whole_folder
from m7mlx_convert.source import Source, Tensor, open_source
from m7mlx_convert.writer import ShardWriter, Spec, stored_specs

_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True)
class Step:
    """What becomes of one parameter: kept as it is, cast, or quantised."""

    name: str
    tensor: Tensor
    dtype: mx.Dtype  # of the weight, or of the scales
    scheme: Quantization | None

    def specs(self) -> list[Spec]:
        """The tensors this gives, in the order they are written."""
        return stored_specs(self.name, self.tensor.shape, self.dtype, self.scheme)

    def arrays(self) -> Iterator[mx.array]:
        """The arrays for `specs`. Raises WeightsError for NaN and infinite numbers."""
        is_kept = self.scheme is self.tensor.scheme
        loaded = self.tensor.load() if is_kept or self.tensor.expand is None else self.tensor.expand()
        for kind, array in loaded.items():
            if mx.issubdtype(array.dtype, mx.floating):
                loaded[kind] = self._finite(array)
        if self.scheme and not is_kept:
            scheme = self.scheme
            yield from mx.quantize(loaded["weight"], group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode)
        else:
            yield from loaded.values()

    def _finite(self, array: mx.array) -> mx.array:
        """`array` in this step's type."""
        cast = array.astype(self.dtype)
        if not is_finite(cast):
            if is_finite(array):
                raise WeightsError(f"{self.name} holds numbers too large for {self.dtype}; give another --dtype")
            raise WeightsError(f"{self.name} holds NaN or infinite numbers; the source is damaged")
        return cast


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
    dtype         type of what is not quantised and of the scales. None keeps the source's; where `quantization`
                  is given, it takes what config.json names, as mlx-lm does
    Raises InputError and its kin before anything is written; DiskError, WeightsError on the way.
    """
    local = Path(source).expanduser()
    repo = None if local.exists() or source == DEMO else ALIASES.get(source, source)
    if revision and not repo:
        raise InputError(f"--revision is for Hub repositories; {source} is here already")
    name = repo.rpartition("/")[2] if repo else local.stem if local.is_file() else local.resolve().name
    given = Path(mlx_path or (f"{name}-{quantization.bits}bit" if quantization else f"{name}-mlx")).expanduser()
    target = given.resolve()
    check_target(target, local, force)  # before a download, not after it
    path = resolve(source, revision)
    check_apart(target, path)
    opened = open_source(path, name)
    steps = plan(opened, quantization, dtype)
    for note in opened.notes + _requantised(steps):
        print(f"note: {note}", file=sys.stderr)
    specs = [spec for step in steps for spec in step.specs()]
    check_space(target, sum(spec.nbytes for spec in specs))
    with whole_folder(target) as work:
        _write_files(work, opened, config_of(opened, steps, dtype), repo, command)
        _check_tokenizer(work, opened)
        _write_weights(work, steps, specs, progress)
    return given


def plan(source: Source, quantization: Quantization | None, dtype: str | None) -> list[Step]:
    """What to do with each tensor. Raises InputError where the scheme does not fit."""
    named = source.raw_config.get("torch_dtype") or source.raw_config.get("dtype")
    asked = _DTYPES.get(str(dtype or (named if quantization else None)))
    steps = []
    for name, tensor in source.tensors.items():
        scheme = quantization if quantization and len(tensor.shape) == 2 else tensor.scheme
        if tensor.scheme and quantization and tensor.expand is None:
            raise InputError(
                f"{source.name} is quantised already ({tensor.scheme.bits} bits); "
                "quantise from the original weights, or leave out --q-bits to keep it as it is"
            )
        if tensor.scheme and scheme is tensor.scheme and dtype and asked != tensor.dtype:
            raise InputError(
                f"{source.name} is quantised, with scales that --dtype {dtype} would change; leave out --dtype"
            )
        if scheme and tensor.shape[-1] % scheme.group_size:
            raise InputError(
                f"{name} has {tensor.shape[-1]} columns, which groups of {scheme.group_size} do not divide; "
                + _fitting_groups(source)
            )
        steps.append(Step(name, tensor, asked or tensor.dtype, scheme))
    return steps


def _fitting_groups(source: Source) -> str:
    columns = [tensor.shape[-1] for tensor in source.tensors.values() if len(tensor.shape) == 2]
    fits = [str(group) for group in (32, 64, 128) if all(n % group == 0 for n in columns)]
    return f"use --q-group-size {' or '.join(fits)}" if fits else "no group size fits this model: leave out --q-bits"


def _requantised(steps: Sequence[Step]) -> tuple[str, ...]:
    if any(step.tensor.scheme and step.scheme is not step.tensor.scheme for step in steps):
        return ("the weights are quantised already and are quantised again: the losses add up",)
    return ()


def config_of(source: Source, steps: Sequence[Step], dtype: str | None) -> dict[str, Any]:
    """config.json of the result: the source's, with `quantization` as mlx-lm writes it."""
    config = dict(source.raw_config)
    if dtype:
        config |= {key: dtype for key in ("torch_dtype", "dtype") if key in config}
    schemes = {step.name.removesuffix(".weight"): step.scheme for step in steps if len(step.tensor.shape) == 2}
    used = [scheme for scheme in schemes.values() if scheme]
    if used:
        base = max(used, key=used.count)
        overrides = {path: scheme for path, scheme in schemes.items() if scheme != base}
        written = Quantization(base.group_size, base.bits, base.mode, overrides).to_dict()
        config |= {"quantization": written, "quantization_config": written}
    return config


def _write_files(
    work: Path, source: Source, config: Mapping[str, Any], repo: str | None, command: Sequence[str]
) -> None:
    for name, content in source.files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, work / name)
        else:
            (work / name).write_bytes(content)
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (work / "README.md").write_text(model_card(source, config, repo, command), encoding="utf-8")


def _check_tokenizer(work: Path, source: Source) -> None:
    try:
        size = load_tokenizer(work).vocab_size
    except TokenizerError as error:  # the folder is about to go: name the source
        raise TokenizerError(str(error).replace(f"{work}", source.name)) from None
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
                    del array  # or it stays until the next one is there
                    bar.advance(task, spec.nbytes)
                mx.clear_cache()  # MLX would keep every freed buffer for reuse
        writer.finish()
    finally:
        writer.close()
