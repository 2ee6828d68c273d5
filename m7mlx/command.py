"""What all commands do alike: parse options, run, report errors, exit with the right status."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import NoReturn

import mlx.core as mx

from m7mlx.cpu import blas, native
from m7mlx.cpu.backend import is_linux_cpu
from m7mlx.errors import M7Error
from m7mlx.files.disk import why
from m7mlx.terminal import make_streams_safe, one_line, print_event

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
KV_BITS = (4, 8, 16, 32)
KV_BITS_HELP = "bits of a key or value: 4, 8, 16 or 32 (default: 16, or 32 where weights are held in 32)"


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser with one-line usage errors, `--debug` and `--version`."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.add_argument("--version", action=_Version, nargs=0, help="show the version, and what computes here")

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Prints the version, then what computes on this machine, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"{parser.prog} {version('m7mlx')}")
        try:
            print(describe_backend())
        except M7Error as error:
            parser.error(str(error))
        parser.exit()


def describe_backend() -> str:
    """Write what computes here: MLX and its device; on Linux's CPU backend kernels and BLAS."""
    if not is_linux_cpu():
        device = "Metal" if mx.metal.is_available() else "CUDA" if mx.cuda.is_available() else "CPU"
        return f"MLX {version('mlx')}, {device}"
    reason = native.why_not()
    inputs = f"products with inputs of {16 if native.rounds_inputs() else 32} bits"
    kernels = f"MLX's own: {reason}" if reason else f"m7mlx's, {native.instruction_set()}, {inputs}"
    return f"MLX {version('mlx')}, CPU\nkernels: {kernels}\nBLAS: {blas.library or 'MLX’s own'}"


def gigabytes(text: str) -> int:
    """Read an option's value, in GB; returns bytes."""
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes") from None


def positive(text: str) -> int:
    """Read an option's value, a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def add_json(parser: argparse._ActionsContainer) -> None:
    """Add --json, which means the same in every command.

    Standard output then carries events and nothing else, one JSON object a line with its kind as
    "event": notes and progress, if the command has them, its results, and at last an "error" if it
    fails (`run`), which is told on stderr as well.
    """
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line on stdout, and nothing else there"
    )


def add_kv_bits(parser: argparse._ActionsContainer) -> None:
    """Add --kv-bits; what is not given is None, the model's own default (`Mistral.kv_bits`)."""
    parser.add_argument("--kv-bits", type=int, choices=KV_BITS, help=KV_BITS_HELP)


def add_parallel(parser: argparse.ArgumentParser) -> None:
    """Add the option of commands that `mlx.launch` starts several of (`m7mlx.parallel.world`)."""
    parser.add_argument(
        "--parallel",
        choices=("tensor", "pipeline"),
        help="under mlx.launch: divide each layer's heads (default, where they can be), or the layers (slow links)",
    )


def run(
    body: Callable[[argparse.Namespace], int | None],
    args: argparse.Namespace,
    prog: str,
) -> int:
    """Run a command and return its exit status; a foreseeable failure is one line on stderr."""
    _open_standard_streams()
    make_streams_safe()
    try:
        try:
            for told in filter(None, (native.note(), blas.note(advise=not native.usable()))):
                say(f"{prog}: note: {one_line(told)}")
            return body(args) or 0
        except (M7Error, OSError, MemoryError) as error:
            if getattr(args, "json", False) and not isinstance(error, BrokenPipeError):
                with contextlib.suppress(OSError, ValueError):  # the line on stderr says it as well
                    print_event("error", message=_message(error))
            raise
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`). Python would complain again when it flushes
        # at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (M7Error, OSError, MemoryError) as error:
        if args.debug:
            raise
        return _report(prog, _message(error), getattr(error, "exit_status", EXIT_FAILED))


def _open_standard_streams() -> None:
    """Open the files 0, 1 and 2 where the caller has closed them.

    The next file to be opened would get such a number, and MLX cannot read from file 0. Without
    sys.stderr Python would print on stdout what is meant for it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def say(line: str) -> None:
    """Print a line on stderr; where that is full or gone, do nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _report(prog: str, message: str, status: int) -> int:
    say(f"{prog}: error: {one_line(message)}")
    return status


def _message(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError):
        return f"{error.filename}: {why(error)}" if error.filename else why(error)
    return str(error)
