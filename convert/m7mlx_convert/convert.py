"""The road of a conversion: open the source, plan every tensor, then read, quantise and write."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m7mlx.errors import InputError, TokenizerError
from m7mlx.files.disk import user_path
from m7mlx.files.hub import ALIASES, DEMO, check_name, existing, resolve
from m7mlx.quantization import Quantization
from m7mlx.tokens.load import load_tokenizer
from m7mlx_convert.adapter import with_adapter
from m7mlx_convert.card import model_card
from m7mlx_convert.output import check_apart, check_space, check_target, whole_folder
from m7mlx_convert.pipeline import computed
from m7mlx_convert.plan import Plan, make_plan
from m7mlx_convert.progress import Reporter
from m7mlx_convert.scheme import Recipe
from m7mlx_convert.source import Source, open_source
from m7mlx_convert.writer import ShardWriter, check_written

if TYPE_CHECKING:
    from m7mlx_convert.calibrated import Calibration

_PIECE = 1 << 22  # bytes


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
    dtype        type of what is not quantised and of the scales. None keeps the source's; where `recipe` quantises,
                 it takes what config.json names, as mlx-lm does
    adapter      LoRA adapter (folder or Hub repository) to merge first
    command      what made it, for the model card
    calibration  quantise by data, from `recipe.base` on
    Raises InputError and its kin before anything is written; DiskError, WeightsError on the way.
    """
    recipe, reporter = recipe or Recipe(), reporter or Reporter()
    check_name(source)
    given = target_of(source, mlx_path, recipe.label)
    target = given.resolve()
    check_target(target, existing(source), force)  # before a download, not after it
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
        written = _write_files(work, plan, model_card(plan, repo_of(source), _commit(path), command))
        _check_tokenizer(work, plan.source)
        _write_weights(work, plan, reporter)
        for name, checksum in written.items():
            check_written(work / name, checksum)
    return given


def repo_of(source: str) -> str | None:
    """The Hub repository that `source` names, if it names one; of "org/name/file.gguf", the first two parts."""
    if existing(source) or source == DEMO:
        return None
    return "/".join(ALIASES.get(source, source).split("/")[:2])


def name_of(source: str) -> str:
    """The model's name: the last part of a repository or path, without a file's ending."""
    local = existing(source)
    if local and local.is_dir():
        return local.resolve().name
    last = ALIASES.get(source, source).rpartition("/")[2]
    return Path(last).stem if last.lower().endswith(".gguf") or local else last


def target_of(source: str, mlx_path: str | Path | None, label: str) -> Path:
    """Where the result goes; beside the user where no place is given."""
    return user_path(mlx_path or f"{name_of(source)}-{label or 'mlx'}")


def resolve_source(source: str, revision: str | None) -> Path:
    """The folder or GGUF file, downloaded if it is not here. Raises NotFoundError, DownloadError, InputError."""
    if revision and not repo_of(source):
        raise InputError(f"--revision is for Hub repositories; {source} is here already")
    return resolve(source, revision, "any")


def open_model(path: Path, source: str, adapter: str | None) -> Source:
    """The source at `path`, with the adapter merged into it."""
    opened = open_source(path, name_of(source))
    return with_adapter(opened, resolve(adapter, layout="adapter")) if adapter else opened


def _calibrate(
    opened: Source, calibration: Calibration, base: Quantization, plan: Plan, reporter: Reporter
) -> Source:
    from m7mlx_convert.calibrated import calibrated

    with tempfile.TemporaryDirectory() as folder:  # the tokenizer, as the result will have it
        _write_files(Path(folder), plan)
        return calibrated(opened, calibration, base, plan.steps[0].dtype, Path(folder), reporter)


def _commit(path: Path) -> str | None:
    """The revision that a path in the Hub's cache is of."""
    return next((part for part in path.parts if re.fullmatch(r"[0-9a-f]{40}", part)), None)


def _write_files(work: Path, plan: Plan, card: str = "") -> dict[str, str]:
    """Write all but the weights; file → SHA-256 of what should be in it."""
    written = {}
    config = json.dumps(plan.config, indent=2) + "\n"
    made = {"config.json": config.encode(), "README.md": card.encode("utf-8", "replace")}
    for name, content in (dict(plan.source.files) | made).items():
        digest = hashlib.sha256()
        with (work / name).open("wb") as file:
            for piece in _pieces(content):
                file.write(piece)
                digest.update(piece)
        written[name] = digest.hexdigest()
    return written


def _pieces(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as source:
        while piece := source.read(_PIECE):
            yield piece


def _check_tokenizer(work: Path, source: Source) -> None:
    try:
        load_tokenizer(work, source.config.vocab_size)
    except TokenizerError as error:  # the folder is about to go: name the source
        raise TokenizerError(str(error).replace(f"{work}", source.name)) from None


def _write_weights(work: Path, plan: Plan, reporter: Reporter) -> None:
    writer = ShardWriter(work, [step.specs for step in plan.steps], plan.key)
    try:
        done = sum(step.nbytes for step in plan.steps[: writer.done])
        if done:
            reporter.note(f"a run that was killed is taken up: {done / plan.nbytes:.0%} is there already")
        with reporter.task("Converting", plan.nbytes) as advance:
            advance(done)
            for step, pieces in computed(plan.steps[writer.done :]):
                writer.write(pieces)
                advance(step.nbytes)
        with reporter.task("Checking", writer.nbytes) as advance:
            writer.finish(advance)
    finally:
        writer.close()
