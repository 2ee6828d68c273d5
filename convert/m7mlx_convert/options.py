"""The options of m7mlx-convert."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from m7mlx.command import ArgumentParser, add_json
from m7mlx.paths import user_path

PROG = "m7mlx-convert"
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
MIXED = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
CALIBRATED = ("awq", "dwq", "gptq", "dynamic")
_DESCRIPTION = """\
Convert a model to an MLX folder that m7mlx-chat, m7mlx and mlx-lm load.

SOURCE is a Hub repository ("mistralai/Mistral-7B-Instruct-v0.3"), a folder (Hugging Face's layout,
Mistral's own, MLX's, AWQ or GPTQ) or a GGUF file, here or on the Hub ("org/name/file.gguf").
Weights stream through memory a tensor at a time."""
_EPILOG = """\
examples:
  m7mlx-convert mistralai/Mistral-7B-Instruct-v0.3 --q-bits 4
  m7mlx-convert mistralai/Mistral-7B-Instruct-v0.3 --q-bits 4 --plan
                                              sizes, before anything is fetched
  m7mlx-convert ~/models/my-finetune --q-bits 4 --q-rule 'lm_head|embed_tokens=8' --verify
  m7mlx-convert ~/models/mistral --adapter ~/adapters/my-lora --q-bits 8 --mlx-path my-8bit
  m7mlx-convert mistral-7b-instruct.Q4_0.gguf
  m7mlx-convert mlx-community/Mistral-7B-Instruct-v0.3-4bit --dequantize --mlx-path mistral-bf16
  m7mlx-convert verify my-finetune-8bit --against ~/models/my-finetune --report quality.html

The result appears under its name only when it is whole; an earlier result is replaced only with
--force. The next run with the same options resumes one that was killed.
`m7mlx-convert verify --help` says how to compare a result with its source.
Exit status: 0 done, 1 failed on the way, 2 bad usage or input, 130 Ctrl-C."""
_VERIFY_DESCRIPTION = """\
Compare a converted model with its source: errors of the weights and activations of each layer, the
KL divergence of its next-token predictions, how often its first choice is the same, and the
perplexity of both on a text.

Both are read a tensor at a time, so that this takes no more memory than the conversion."""
_VERIFY_EPILOG = """\
examples:
  m7mlx-convert verify Mistral-7B-Instruct-v0.3-4bit --against mistralai/Mistral-7B-Instruct-v0.3
  m7mlx-convert verify my-4bit --against my-finetune --text chapter.txt --tokens 2048
  m7mlx-convert verify my-4bit --against my-finetune --report quality.html"""


def parse_convert(argv: Sequence[str]) -> argparse.Namespace:
    """Read the options of a conversion."""
    parser = ArgumentParser(PROG, _DESCRIPTION, _EPILOG)
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="Hub repository, folder or GGUF file")
    parser.add_argument("--hf-path", metavar="SOURCE", help="the same, as mlx-lm spells it")
    parser.add_argument(
        "--mlx-path", metavar="OUT", help="folder to write (default: ./<name>-mlx or ./<name>-<N>bit)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--adapter", metavar="LORA", help="merge a LoRA adapter (mlx-lm's or PEFT's folder, or Hub)")
    parser.add_argument("--force", action="store_true", help="replace OUT, a result of this program")
    bits = parser.add_argument_group("quantisation (without any of these, the numbers stay as they are)")
    bits.add_argument("--q-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="bits a weight")
    bits.add_argument("--quantize", action="store_true", help="the same as --q-bits 4 (mlx-lm's -q)")
    bits.add_argument("--q-group-size", type=int, choices=(16, 32, 64, 128), help="weights that share a scale (64)")
    bits.add_argument("--q-mode", choices=MODES, help="integers with scale and bias (affine), or a float format")
    bits.add_argument("--quant-predicate", choices=MIXED, help="mlx-lm's mix: low bits, high ones where it matters")
    bits.add_argument(
        "--q-rule",
        metavar="PATTERN=BITS",
        action="append",
        default=[],
        help="bits of the layers whose name the regular expression matches: N, N:GROUP, a mode, or none; "
        "may be repeated, the first that matches counts",
    )
    bits.add_argument("-d", "--dequantize", action="store_true", help="expand a quantised source")
    bits.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="type of what is not quantised (default: the source's)",
    )
    data = parser.add_argument_group("quantisation by data (mlx-lm's quantisers; the whole model is held in memory)")
    data.add_argument("--calibrate", choices=CALIBRATED, help="awq, dwq, gptq, or dynamic bits")
    data.add_argument("--calibration-text", metavar="FILE", type=Path, help="text to learn from (default: built in)")
    data.add_argument("--calibration-tokens", metavar="N", type=int, help="how much of it (default: 16384)")
    data.add_argument("--target-bpw", metavar="BITS", type=float, help="for dynamic: bits a weight on average (5)")
    checks = parser.add_argument_group("before and after")
    checks.add_argument(
        "--plan", action="store_true", help="print sizes and memory, and stop before anything is done"
    )
    checks.add_argument("--verify", action="store_true", help="compare the result with the source")
    _add_text(checks)
    checks.add_argument("--upload-repo", metavar="ORG/NAME", help="upload the result to the Hub")
    _add_output(parser)
    args = parser.parse_args(argv)
    if bool(args.source) == bool(args.hf_path):
        parser.error("give one SOURCE" if not args.source else "give SOURCE or --hf-path, not both")
    args.source = args.source or args.hf_path
    _check_usage(parser, args)
    return args


def _check_usage(parser: ArgumentParser, args: argparse.Namespace) -> None:
    chosen = args.q_bits or args.quantize or args.q_mode or args.quant_predicate
    if args.quant_predicate and (args.q_bits or args.q_mode not in (None, "affine")):
        parser.error("--quant-predicate chooses the bits itself; leave out --q-bits and --q-mode")
    if args.dequantize and (chosen or args.q_rule or args.calibrate):
        parser.error("--dequantize and quantising exclude each other")
    if args.q_group_size and not (chosen or args.q_rule or args.calibrate):
        parser.error("--q-group-size needs --q-bits")
    if args.calibrate and (args.q_mode not in (None, "affine") or args.quant_predicate or args.q_rule):
        parser.error("--calibrate takes --q-bits and --q-group-size only")
    if not args.calibrate and (args.calibration_text or args.calibration_tokens):
        parser.error("--calibration-text and --calibration-tokens need --calibrate")
    if args.target_bpw and args.calibrate != "dynamic":
        parser.error("--target-bpw needs --calibrate dynamic")
    if (args.text or args.tokens) and not (args.verify or args.report):
        parser.error("--text and --tokens need --verify")
    _check_text(parser, args)


def parse_verify(argv: Sequence[str]) -> argparse.Namespace:
    """Read the options of `m7mlx-convert verify`."""
    parser = ArgumentParser(f"{PROG} verify", _VERIFY_DESCRIPTION, _VERIFY_EPILOG)
    parser.add_argument("folder", metavar="FOLDER", help="the converted model")
    parser.add_argument("--against", metavar="SOURCE", required=True, help="what it was converted from")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--adapter", metavar="LORA", help="the adapter that was merged")
    _add_text(parser)
    _add_output(parser)
    args = parser.parse_args(argv)
    _check_text(parser, args)
    return args


def _add_text(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--text", metavar="FILE", type=Path, help="text to compare on (default: built in)")
    parser.add_argument("--tokens", metavar="N", type=int, help="how much of it (default: 512)")
    parser.add_argument("--report", metavar="FILE", type=Path, help="write the comparison with plots, as HTML")


def _check_text(parser: ArgumentParser, args: argparse.Namespace) -> None:
    if args.tokens is not None and args.tokens < 2:
        parser.error("--tokens must be at least 2")
    if args.report and not user_path(args.report).resolve().parent.is_dir():
        parser.error(f"the folder of {args.report} does not exist")


def _add_output(parser: argparse.ArgumentParser) -> None:
    quiet = parser.add_mutually_exclusive_group()
    quiet.add_argument("-q", "--quiet", action="store_true", help="no notes, no progress bar")
    add_json(quiet)
