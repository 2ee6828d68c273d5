"""The road of a conversion: open the source, plan every tensor, then read, quantise and write."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m7mlx.errors import TokenizerError
from m7mlx.files.hub import check_name, find_existing
from m7mlx.quantization import Quantization
from m7mlx.tokens.load import load_tokenizer
from m7mlx_convert.card import model_card
from m7mlx_convert.opening import find_repo, name_target, open_model, resolve_source
from m7mlx_convert.output import check_apart, check_space, check_target, whole_folder
from m7mlx_convert.pipeline import compute_ahead
from m7mlx_convert.plan import Plan, make_plan
from m7mlx_convert.progress import Reporter
from m7mlx_convert.scheme import Recipe
from m7mlx_convert.source import Source
from m7mlx_convert.writer import WeightsWriter, check_written

if TYPE_CHECKING:
    from m7mlx_convert.calibrated import Calibration

_BLOCK = 1 << 22  # bytes


def convert(
    source: str,
    mlx_path: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
    command: Sequence[str] = (),
    calibration: Calibration | None = None,
) -> Path:
    """Convert `source` (Hub repository, folder or GGUF file) and return the folder written.

    recipe       bits of every matrix; the default keeps the source's numbers
    dtype        type of what is not quantised and of the scales. None keeps the source's; where
                 `recipe` quantises, it takes what config.json names, as mlx-lm does
    adapter      LoRA adapter (folder or Hub repository) to merge first
    command      what made the result, for the model card
    calibration  quantise by data, from `recipe.base` on

    Raises InputError and its kin before anything is written; DiskError, WeightsError on the way.
    """
    recipe, reporter = recipe or Recipe(), reporter or Reporter()
    check_name(source)
    given = name_target(source, mlx_path, recipe.label)
    target = given.resolve()
    check_target(target, find_existing(source), force)  # before a download, not after it
    path = resolve_source(source, revision)
    check_apart(target, path)
    opened = open_model(path, source, adapter)
    plan = make_plan(opened, recipe, dtype)
    if calibration and recipe.base:
        check_space(target, plan.nbytes)  # before hours of work
        opened = _calibrate(opened, calibration, recipe.base, plan, reporter)
        plan = make_plan(opened, Recipe(), None)
    for note in plan.notes:
        reporter.note(note)
    check_space(target, plan.nbytes)
    with whole_folder(target, plan.key) as work:
        written = _write_files(work, plan, model_card(plan, find_repo(source), _commit(path), command))
        _check_tokenizer(work, plan.source)
        _write_weights(work, plan, reporter)
        for name, checksum in written.items():
            check_written(work / name, checksum)
    return given


def _calibrate(
    opened: Source,
    calibration: Calibration,
    base: Quantization,
    plan: Plan,
    reporter: Reporter,
) -> Source:
    from m7mlx_convert.calibrated import calibrate  # most conversions do without it

    with tempfile.TemporaryDirectory() as folder:  # the tokenizer, as the result will have it
        _write_files(Path(folder), plan)
        return calibrate(opened, calibration, base, plan.parameters[0].dtype, Path(folder), reporter)


def _commit(path: Path) -> str | None:
    """Return the revision that a path in the Hub's cache belongs to."""
    return next((part for part in path.parts if re.fullmatch(r"[0-9a-f]{40}", part)), None)


def _write_files(work: Path, plan: Plan, card: str = "") -> dict[str, str]:
    """Write all but the weights; return file → SHA-256 of what should be in it."""
    written = {}
    config = json.dumps(plan.config, indent=2) + "\n"
    made = {"config.json": config.encode(), "README.md": card.encode("utf-8", "replace")}
    for name, content in (dict(plan.source.files) | made).items():
        digest = hashlib.sha256()
        with (work / name).open("wb") as file:
            for block in _blocks(content):
                file.write(block)
                digest.update(block)
        written[name] = digest.hexdigest()
    return written


def _blocks(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as source:
        while block := source.read(_BLOCK):
            yield block


def _check_tokenizer(work: Path, source: Source) -> None:
    try:
        load_tokenizer(work, source.config.vocab_size)
    except TokenizerError as error:  # the folder is about to go: name the source
        raise TokenizerError(str(error).replace(f"{work}", source.name)) from None


def _write_weights(work: Path, plan: Plan, reporter: Reporter) -> None:
    writer = WeightsWriter(work, [planned.specs for planned in plan.parameters], plan.key)
    try:
        done = sum(planned.nbytes for planned in plan.parameters[: writer.done])
        if done:
            reporter.note(f"a run that was killed is taken up: {done / plan.nbytes:.0%} is there already")
        with reporter.task("Converting", plan.nbytes) as advance:
            advance(done)
            for planned, tensors in compute_ahead(plan.parameters[writer.done :]):
                writer.write(tensors)
                advance(planned.nbytes)
        with reporter.task("Checking", writer.nbytes) as advance:
            writer.finish(advance)
    finally:
        writer.close()
