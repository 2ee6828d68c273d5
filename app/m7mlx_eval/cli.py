"""The command line of m7mlx-eval.

Each function imports what it needs: help and wrong options do not wait for the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m7mlx.command import ArgumentParser, add_json, add_kv_bits, gigabytes, positive, run
from m7mlx.errors import InputError
from m7mlx.paths import user_path
from m7mlx.terminal import one_line, print_event

if TYPE_CHECKING:
    from m7mlx.model import Mistral
    from m7mlx.tokens.tokenizer import Tokenizer
    from m7mlx_eval.adapter import M7LM

PROG = "m7mlx-eval"
_DESCRIPTION = """\
Measure how good a model is: its perplexity on a text, how far it is from another model (what fewer
bits cost), or its results on tasks of lm-evaluation-harness.

MODEL is a folder, a Hub repository or an alias, as for m7mlx-chat."""
_EPILOG = """\
examples:
  m7mlx-eval demo --text book.txt                 perplexity; the text rolls through the cache once
  m7mlx-eval demo --text book.txt --context 512 --stride 128
                                                  512 tokens at once, each scored after at least 385
  m7mlx-eval demo --text pages.jsonl --field body --max-tokens 100000 --save result.json
  m7mlx-eval my-4bit --against my-finetune --text book.txt
                                                  KL divergence and top-1 agreement besides
  m7mlx-eval demo --against demo --text book.txt --kv-bits 4
                                                  what keys and values in 4 bits cost
  m7mlx-eval demo --tasks arc_easy,hellaswag --limit 100
                                                  tasks by name; their data comes from the Hub
  m7mlx-eval mistral --tasks mmlu --num-fewshot 5 --output mmlu-mistral
                                                  keep each answer: a run that was killed resumes
  m7mlx-eval mistral --tasks gsm8k --chat --batch-size 16
  m7mlx-eval demo --tasks my_task.yaml            a task file of your own

A text file is one document, a data set (.jsonl, .json, .parquet) one for each object's text; each is
read by itself. KL is that of the model from the reference, Σ p (log p − log q) with p the
reference's; ± is one standard error, over tokens or questions. Task files can hold Python code, as
those of the harness do: run only those that you trust.
Exit status: 0 done, 1 failed on the way, 2 bad usage or input, 130 Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run(_eval, _parse(argv), PROG)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(PROG, _DESCRIPTION, _EPILOG)
    parser.add_argument("model", metavar="MODEL", help="folder, Hub repository or alias")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help=".txt, .md, .jsonl, .json, .parquet; - for stdin")
    what.add_argument("--tasks", metavar="A,B", help="tasks, groups, patterns or YAML files of lm-evaluation-harness")
    text = parser.add_argument_group("with --text")
    text.add_argument("--against", metavar="MODEL", help="the reference: KL divergence, top-1 agreement, perplexity")
    text.add_argument("--field", metavar="NAME", help="where a data set keeps its texts (text)")
    text.add_argument("--stride", type=positive, metavar="N", help="tokens that windows advance by (half of them)")
    text.add_argument("--max-tokens", type=positive, metavar="N", help="read no more than so many")
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument("--include-path", type=Path, metavar="DIR", help="more task files")
    tasks.add_argument("--num-fewshot", type=_count, metavar="N", help="examples before each question")
    tasks.add_argument("--limit", type=positive, metavar="N", help="questions of each task, the first ones")
    tasks.add_argument("--batch-size", type=positive, metavar="N", help="questions at a time (8)")
    tasks.add_argument("--chat", action="store_true", help="ask in the model's chat format")
    tasks.add_argument("--system", metavar="TEXT", help="the system prompt, with --chat")
    tasks.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="keep each answer, and the results; a killed run goes on from there",
    )
    tasks.add_argument(
        "--allow-code",
        action="store_true",
        help="let HumanEval and its like run programs that the model writes, and task files that are not the "
        "harness's own run theirs: !function, metrics from the Hub, templates without a sandbox",
    )
    both = parser.add_argument_group("with both")
    both.add_argument(
        "--context", type=positive, metavar="N", help="tokens that are read at once at most (what the model allows)"
    )
    add_kv_bits(both)
    both.add_argument("--save", type=Path, metavar="FILE", help="keep the figures, as JSON")
    add_json(both)
    both.add_argument("--max-memory", type=gigabytes, metavar="GB", help="load no model beyond it")
    args = parser.parse_args(argv)
    _check_usage(parser, args)
    return args


def _check_usage(parser: ArgumentParser, args: argparse.Namespace) -> None:
    other = (
        ("include_path", "num_fewshot", "limit", "batch_size", "chat", "system", "output", "allow_code")
        if args.text
        else ("against", "field", "stride", "max_tokens")
    )
    for name in other:
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} goes with {'--tasks' if args.text else '--text'}")
    if args.stride and not args.context:
        parser.error("--stride needs --context")
    if args.stride and args.stride > args.context:
        parser.error(f"--stride must not exceed --context, {args.stride} exceeds {args.context}")
    if args.system and not args.chat:
        parser.error("--system needs --chat")
    if args.save and not user_path(args.save).absolute().parent.is_dir():
        parser.error(f"the folder of {args.save} does not exist")


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _eval(args: argparse.Namespace) -> None:
    from m7mlx.memory import limit_memory

    if args.max_memory is not None:
        limit_memory(args.max_memory)
    found = _text(args) if args.text else _tasks(args)
    if args.save:
        from m7mlx.files.disk import write_whole

        write_whole(args.save, json.dumps(found, indent=1, default=str) + "\n")


# --- texts ------------------------------------------------------------------------------------


def _text(args: argparse.Namespace) -> dict[str, Any]:
    from m7mlx_eval.perplexity import Reading, evaluate
    from m7mlx_eval.progress import show_bar
    from m7mlx_eval.report import show_text
    from m7mlx_eval.texts import read_documents

    reading = Reading(args.context, args.stride, args.max_tokens, args.kv_bits)
    texts = read_documents(args.text, args.field or "text", args.max_tokens)
    first = next(texts, None)  # a file that cannot be read is told before a model is loaded
    if first is None:
        raise InputError(f"{args.text} holds no texts")
    model, tokenizer = _load_model(args.model)
    reference = None
    if args.against:
        reference, theirs = _load_model(args.against)
        _check_alike(args, (model, tokenizer), (reference, theirs))
    with show_bar("Reading", args.max_tokens, "tokens", is_shown=not args.json) as advance:
        result = evaluate(
            model,
            tokenizer,
            chain([first], texts),
            reading,
            reference=reference,
            note=partial(_note, args),
            advance=advance,
        )
    found = {"model": args.model, "against": args.against, "text": args.text} | result.to_dict()
    _show(args, found, show_text)
    return found


def _note(args: argparse.Namespace, text: str) -> None:
    if args.json:
        print_event("note", text=text)
    else:
        print(f"{PROG}: note: {one_line(text)}", file=sys.stderr)


def _show(
    args: argparse.Namespace,
    found: dict[str, Any],
    show: Callable[[dict[str, Any]], None],
) -> None:
    if args.json:
        print_event("result", **found)
    else:
        show(found)


def _load_model(name: str) -> tuple[Mistral, Tokenizer]:
    from m7mlx.loading import load

    return load(name)


def _check_alike(
    args: argparse.Namespace,
    model: tuple[Mistral, Tokenizer],
    reference: tuple[Mistral, Tokenizer],
) -> None:
    """Raise InputError for two models whose tokens are not the same."""
    sizes = [side[0].config.vocab_size for side in (model, reference)]
    tokens = [_pieces(side[1], min(sizes)) for side in (model, reference)]
    if sizes[0] != sizes[1] or tokens[0] != tokens[1]:
        raise InputError(
            f"{args.model} and {args.against} have different vocabularies ({sizes[0]:,} and {sizes[1]:,} tokens); "
            "only models of one family can be compared"
        )


def _pieces(tokenizer: Tokenizer, count: int) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in range(min(count, tokenizer.vocab_size))]


# --- tasks ------------------------------------------------------------------------------------


def _tasks(args: argparse.Namespace) -> dict[str, Any]:
    from m7mlx_eval.tasks import Selection, prepare, run_tasks

    prepare()
    from m7mlx_eval.report import pick_figures, show_tasks, write_samples

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task")
    selection = Selection(
        names, args.include_path, args.num_fewshot, args.limit, args.chat, args.system, args.allow_code
    )
    with ExitStack() as stack:
        results = run_tasks(lambda: _adapter(args, stack), selection)
    found = {"model": args.model} | pick_figures(results)
    _show(args, found, show_tasks)
    if args.output:
        write_samples(args.output, found, results)
    return found


def _adapter(args: argparse.Namespace, stack: ExitStack) -> M7LM:
    from m7mlx_eval.adapter import M7LM
    from m7mlx_eval.journal import Journal, find_binding

    model, tokenizer = _load_model(args.model)
    journal = None
    if args.output:
        bound = find_binding(args.model, model, context=args.context, kv_bits=args.kv_bits)
        journal = stack.enter_context(Journal(args.output, bound))
    return M7LM(
        model,
        tokenizer,
        batch_size=args.batch_size or 8,
        max_length=args.context,
        kv_bits=args.kv_bits,
        journal=journal,
    )
