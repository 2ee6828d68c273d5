"""The command line of m7mlx-convert.

Each function imports what it needs: help and wrong options do not wait for the rest.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from m7mlx.command import run
from m7mlx_convert.options import PROG, parse_convert, parse_verify

if TYPE_CHECKING:
    from m7mlx_convert.calibrated import Calibration
    from m7mlx_convert.progress import Reporter
    from m7mlx_convert.scheme import Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _interrupt)  # `kill` cleans up as Ctrl-C does
    if given[:1] == ["verify"]:
        return run(_verify, parse_verify(given[1:]), f"{PROG} verify")
    return run(_convert, parse_convert(given), PROG)


def _reporter(args: argparse.Namespace) -> Reporter:
    """Return what tells the user; keep downloads quiet beside it."""
    from m7mlx_convert.progress import Reporter

    if args.json or args.quiet or not sys.stderr.isatty():
        from m7mlx.files.repository import silence_downloads

        silence_downloads()
    return Reporter("json" if args.json else "quiet" if args.quiet else "text")


def _convert(args: argparse.Namespace) -> None:
    """Convert, or show the plan; compare and upload the result if asked to."""
    from m7mlx_convert.convert import convert

    reporter = _reporter(args)
    recipe = _recipe(args)
    if args.plan:
        _plan(args, recipe, reporter)
        return
    if args.upload_repo:
        from m7mlx_convert.upload import check_upload

        check_upload(args.upload_repo)
    folder = convert(
        args.source,
        args.mlx_path,
        recipe=recipe,
        dtype=args.dtype,
        revision=args.revision,
        adapter=args.adapter,
        force=args.force,
        reporter=reporter,
        command=_command(args),
        calibration=_calibration(args),
    )
    reporter.result("done", str(folder), folder=str(folder))
    if args.verify:
        _compare(args, str(folder), args.source, reporter)
    if args.upload_repo:
        from m7mlx_convert.upload import upload

        url = upload(folder, args.upload_repo, reporter)
        reporter.result("uploaded", url, url=url)


def _plan(args: argparse.Namespace, recipe: Recipe, reporter: Reporter) -> None:
    """Show what a conversion would do."""
    from m7mlx.files.hub import check_name, resolve
    from m7mlx_convert.adapter import merge_adapter
    from m7mlx_convert.opening import name_target, open_model, resolve_source
    from m7mlx_convert.plan import make_plan, plan_table
    from m7mlx_convert.remote import open_remote

    check_name(args.source)
    target = name_target(args.source, args.mlx_path, recipe.label).resolve()
    source = open_remote(args.source, args.revision) or open_model(
        resolve_source(args.source, args.revision), args.source, None
    )
    if args.adapter:
        source = merge_adapter(source, resolve(args.adapter, layout="adapter"))
    if calibration := _calibration(args):
        from m7mlx_convert.calibrated import note_calibration

        source = note_calibration(source, calibration)
    plan = make_plan(source, recipe, args.dtype)
    reporter.result("plan", plan_table(plan, target), **plan.describe(target))


def _verify(args: argparse.Namespace) -> None:
    """Compare a result with its source."""
    _compare(args, args.folder, args.against, _reporter(args))


def _compare(args: argparse.Namespace, result: str, source: str, reporter: Reporter) -> None:
    """Compare, report the figures, and write the report if asked to."""
    from m7mlx_convert.opening import open_model, resolve_source
    from m7mlx_convert.report import comparison_table, write_report
    from m7mlx_convert.text import read_text
    from m7mlx_convert.verify import compare

    folder = resolve_source(result, None)
    made = open_model(folder, result, None)
    text = read_text(folder, made.config.vocab_size, args.text, args.tokens, reporter)
    comparison = compare(
        open_model(resolve_source(source, args.revision), source, args.adapter), made, text, reporter
    )
    if args.report:
        write_report(comparison, args.report)
    reporter.result("comparison", comparison_table(comparison), **comparison.to_dict())


def _recipe(args: argparse.Namespace) -> Recipe:
    """Return the bits that the options ask for. Raises InputError."""
    from m7mlx_convert.scheme import Recipe, Rule, make_scheme

    base = None
    if args.q_bits or args.quantize or args.q_mode or args.quant_predicate or args.calibrate:
        base = make_scheme(args.q_mode or "affine", args.q_bits, args.q_group_size)
    rules = tuple(Rule.parse(rule, args.q_group_size) for rule in args.q_rule)
    return Recipe(base, args.quant_predicate, rules, args.dequantize)


def _calibration(args: argparse.Namespace) -> Calibration | None:
    """Return the method that the options ask for."""
    if not args.calibrate:
        return None
    from m7mlx_convert.calibrated import Calibration

    return Calibration(args.calibrate, args.calibration_text, args.calibration_tokens, args.target_bpw)


def _command(args: argparse.Namespace) -> list[str]:
    """Return the command for the model card, without private paths."""
    from m7mlx.files.hub import find_existing

    command = [PROG]
    for value in (args.source, args.adapter):
        if value:
            local = find_existing(value)
            shown = local.resolve().name if local else value
            command += [shown] if value is args.source else ["--adapter", shown]
    flags = ("revision", "q_bits", "q_group_size", "q_mode", "quant_predicate", "dtype", "calibrate")
    for flag in (*flags, "calibration_tokens", "target_bpw"):
        if getattr(args, flag):
            command += ["--" + flag.replace("_", "-"), str(getattr(args, flag))]
    if args.calibration_text:
        command += ["--calibration-text", args.calibration_text.name]
    for rule in args.q_rule:
        command += ["--q-rule", rule]
    return command + [f"--{flag}" for flag in ("quantize", "dequantize") if getattr(args, flag)]


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
