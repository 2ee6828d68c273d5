"""The command line of m7mlx-chat: which of its faces to show, and with which settings."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from m7mlx.command import (
    EXIT_FAILED,
    KV_BITS,
    ArgumentParser,
    add_json,
    add_kv_bits,
    add_parallel,
    gigabytes,
    run,
    say,
)
from m7mlx.errors import InputError
from m7mlx.parallel.launch import is_launched
from m7mlx.paths import user_path
from m7mlx_chat import ENGINE_THREAD

if TYPE_CHECKING:
    from m7mlx.parallel.world import World
    from m7mlx.shard import Mode
    from m7mlx_chat.config import Config
    from m7mlx_chat.environment import Environment
    from m7mlx_chat.settings import Settings

# What brings MLX or Textual is imported where it is needed: --help and wrong options need neither,
# and together they take most of a second.
PROG = "m7mlx-chat"
_DESCRIPTION = """\
Chat with a model on this machine. Nothing leaves it.

In a terminal this opens the chat. With -p or with piped input it prints the answer only. With --plain, and where
nothing can be drawn, it talks in lines.
Conversations are kept in the user's data directory; --no-save keeps nothing."""
_EPILOG = """\
examples:
  m7mlx-chat                                        chat with Mistral-7B-Instruct-v0.3 (4 bits, 4.1 GB, fetched once)
  m7mlx-chat --model demo                           chat with a small model (93 MB)
  m7mlx-chat --model ./my-model --temp 0.7          a folder that m7mlx-convert or mlx-lm wrote
  m7mlx-chat -p "What is the capital of France?"    one answer on stdout
  m7mlx-chat --continue -p "And of Spain?"          … in the conversation before
  git diff | m7mlx-chat -p "Review this change"     the piped text follows the question
  m7mlx-chat --plain                                the chat in lines, for screen readers and logs
  m7mlx-chat --file notes.md -i -p "Sum this up"    answer, then stay in the chat
  m7mlx-chat --speculate lookup --kv-bits 8         faster quotes and edits, half the memory per token

Defaults, presets, theme and keys can be set in config.toml (F2 in the chat shows where it lies).
Exit status: 0 answered, 1 failed, 2 bad usage or input, 130 Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.json and (args.interactive or args.web or args.import_file):
        parser.error("--json prints an answer; --interactive, --web and --import do something else: choose one")
    if args.plain and (args.web or args.import_file):
        parser.error("--plain talks in lines; --web and --import do something else: choose one")
    try:
        status = run(_chat, args, PROG)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else EXIT_FAILED
    return _left(status)


def _left(status: int) -> int:
    """End at once where the model is still computing; returns the exit status otherwise.

    To end in order would abort the process.
    """
    if any(thread.name == ENGINE_THREAD for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(PROG, _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="folder, Hub repository (org/name) or alias: mistral (default), ministral-8b, demo, …",
    )
    parser.add_argument("-p", "--prompt", metavar="QUESTION", help="answer this and leave")
    parser.add_argument(
        "--file", action="append", default=[], metavar="PATH", help="put a text file into the question; repeatable"
    )
    parser.add_argument(
        "--suffix", metavar="TEXT", help="print what stands between -p, or piped text, and TEXT (Codestral)"
    )
    parser.add_argument("-i", "--interactive", action="store_true", help="answer -p in the chat, and stay there")
    parser.add_argument(
        "--plain", action="store_true", help="talk in lines: for screen readers, logs, and terminals without a cursor"
    )
    parser.add_argument(
        "-c", "--continue", action="store_true", dest="go_on", help="go on with the last conversation"
    )
    add_json(parser)
    parser.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="with -p: an answer in JSON that fits this schema"
    )
    parser.add_argument(
        "--allow-tool",
        action="append",
        default=[],
        metavar="NAME",
        help="let the model call the tools of a server in config.toml unasked; NAME/TOOL: one of them; repeatable",
    )
    parser.add_argument("--no-save", action="store_true", help="keep nothing of this conversation")
    parser.add_argument(
        "--import", dest="import_file", metavar="FILE", help="take in conversations (ours, ChatGPT's) and leave"
    )
    _add_settings(parser)
    add_parallel(parser)
    web = parser.add_argument_group("in a browser")
    web.add_argument("--web", action="store_true", help="serve the chat to a browser on this machine (extra: web)")
    web.add_argument("--port", type=int, default=8765, metavar="N", help="its port (default: %(default)s)")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Options named after `settings.FIELDS`; those not given stay as the user's file has them."""
    parser.add_argument("--preset", metavar="NAME", help="settings kept under a name in config.toml")
    parser.add_argument("--system", metavar="TEXT", help="system prompt: how the model should behave")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: 4096)")
    parser.add_argument(
        "--reasoning-effort", metavar="HOW", help="how much to think, for models that can be told: none, high …"
    )
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--max-memory", type=gigabytes, metavar="GB", help="load no model, and let no conversation grow, beyond it"
    )
    add_kv_bits(memory)
    memory.add_argument(
        "--kv-group-size", type=int, choices=(32, 64, 128), help="in 4 or 8 bits: in groups of (default: 64)"
    )
    memory.add_argument(
        "--max-kv-size",
        type=int,
        metavar="N",
        help="models without a window: keep the first 4 and the last N - 4 tokens, and go on for ever",
    )
    memory.add_argument(
        "--kv-disk",
        type=float,
        metavar="GB",
        help="keep up to so much on the disk, so that conversations go on at once when opened again "
        "(default: 8; 0: none)",
    )
    memory.add_argument(
        "--kv-disk-bits", type=int, choices=KV_BITS, help="in so many bits (default: 8; 16 and 32 change no answer)"
    )
    parser.add_argument(
        "--speculate",
        metavar="HOW",
        help="same answer, sooner: lookup (text that repeats itself), or a small model of the same family; "
        "off (default)",
    )
    sampling = parser.add_argument_group("sampling (greedy unless --temp is given)")
    sampling.add_argument(
        "--temp", "--temperature", dest="temperature", type=float, metavar="T", help="randomness; 0: none"
    )
    sampling.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens up to P")
    sampling.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens")
    sampling.add_argument("--min-p", type=float, metavar="P", help="keep tokens P times as likely as the best")
    sampling.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before TEXT; repeatable")


def _chat(args: argparse.Namespace) -> int:
    from m7mlx_chat.choice import choose_model
    from m7mlx_chat.config import Config, read_config
    from m7mlx_chat.environment import read_environment
    from m7mlx_chat.settings import FIELDS

    environment = read_environment()
    in_terminal = environment.in_browser or bool(
        sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty()
    )
    asked = args.prompt is not None or bool(args.file) or args.suffix is not None
    talks = args.interactive or (not asked and not args.json and (args.plain or in_terminal or _is_typed()))
    notes = []
    try:
        config = read_config(environment.config)
    except InputError as error:
        if not talks:
            raise
        config = Config(environment.config)  # the chat comes up and says so
        notes = [str(error)]
    if args.no_save or config.no_save:  # and there is no place to keep a title for
        config = replace(config, no_save=True, model_titles=False)
    given = {name: value for name in FIELDS if (value := getattr(args, name)) is not None}
    settings = config.settings(args.preset).changed(given)
    most = args.max_memory if args.max_memory is not None else config.max_memory
    if most is not None:
        from m7mlx.memory import limit_memory

        limit_memory(most)
    _check_together(args, asked, in_terminal)
    if args.web:
        from m7mlx_chat.web import serve

        return serve(sys.argv[1:], args.port, None if config.no_save else environment.copies)
    if args.import_file:
        return _import_file(args.import_file, environment)
    preset = config.preset(args.preset) if args.preset is not None else {}
    named = given.get("model", preset.get("model"))
    choice = choose_model(named, config, environment.database, environment.models)
    settings = settings.changed({"model": choice.model})
    if talks and (in_lines := _reason_for_lines(args.plain, environment)) is not None:
        return _talk_in_lines(args, config, settings, environment, [*in_lines, *notes, *choice.notes])
    if talks:
        from m7mlx_chat.launch import Start, launch
        from m7mlx_chat.question import question_of

        start = Start(
            question=question_of(args.prompt, args.file) if asked or not in_terminal else None,
            go_on=args.go_on,
            save=not config.no_save,
            fetch=choice.is_wanted,
            notes=[*notes, *choice.notes],
            allowed=args.allow_tool,
        )
        return launch(config, settings, environment, start)
    for note in choice.notes:
        say(f"{PROG}: {note}")
    return _answer(args, settings, config, None if config.no_save else environment)


def _is_typed() -> bool:
    """Whether standard input is a terminal."""
    return bool(sys.stdin and sys.stdin.isatty())


def _reason_for_lines(is_wanted: bool, environment: Environment) -> list[str] | None:
    """What to tell about the line mode where the chat cannot be drawn; None where it can."""
    if is_wanted:
        return []
    if environment.in_browser:
        return None
    if not (sys.stdout and sys.stdout.isatty()):
        return [f"{PROG}: there is no terminal to draw the chat on; it goes on in lines, as with --plain"]
    if environment.is_dumb:
        return [f"{PROG}: this terminal (TERM=dumb) cannot show the chat; it goes on in lines, as with --plain"]
    return None


def _talk_in_lines(
    args: argparse.Namespace,
    config: Config,
    settings: Settings,
    environment: Environment,
    notes: list[str],
) -> int:
    """Talk in lines until the user leaves; returns the exit status."""
    from m7mlx_chat.plain.talk import Start, run_lines
    from m7mlx_chat.question import question_of

    asked = args.prompt is not None or bool(args.file)
    question = question_of(args.prompt, args.file) if asked else None
    if asked and not _is_typed() and sys.stdout and sys.stdout.isatty():
        # The question came through a pipe: what follows is typed.
        os.dup2(os.open(os.ttyname(1), os.O_RDWR), 0)
    start = Start(question=question, go_on=args.go_on, save=not config.no_save, allowed=args.allow_tool, notes=notes)
    return run_lines(config, settings, environment, start)


def _check_together(args: argparse.Namespace, asked: bool, in_terminal: bool) -> None:
    """Raise InputError for options that exclude each other."""
    if args.suffix is not None:
        others = (args.interactive, args.web, args.import_file, args.go_on, args.json_schema, args.file)
        if any(others) or is_launched():
            raise InputError("--suffix prints what stands between two texts; it goes with -p and settings only")
        if args.prompt is None and in_terminal:
            raise InputError('--suffix: there is no text before it; give one with -p "…" or pipe it in')
    if args.json_schema and (args.interactive or not (asked or not in_terminal)):
        raise InputError("--json-schema is for a single answer: give the question with -p")
    if is_launched() and (args.web or args.interactive or not asked):
        raise InputError('under mlx.launch there is no terminal: give the question with -p "…"')


def _import_file(name: str, environment: Environment) -> int:
    """Store the conversations of a file; returns the exit status."""
    from m7mlx_chat.portable import read_file
    from m7mlx_chat.store import Store

    imported = read_file(user_path(name))
    with Store(environment.database) as store:
        store.plant(imported.trees)
    print(imported.told())
    return 0


def _answer(
    args: argparse.Namespace,
    settings: Settings,
    config: Config,
    environment: Environment | None,
) -> int:
    """Print one answer, or be one of `mlx.launch`'s other processes; returns the exit status.

    Nothing is kept without an `environment`.
    """
    from m7mlx_chat.headless import Tools, answer, fill_in
    from m7mlx_chat.question import piped_text, question_of, read_schema

    if args.suffix is not None:
        prefix = piped_text() if args.prompt is None else args.prompt
        return fill_in(settings, prefix, args.suffix, as_json=args.json)

    world = _join(args.parallel, settings) if is_launched() else None
    if world is not None and world.rank:
        from m7mlx.files.hub import resolve
        from m7mlx.parallel.world import run_rank

        return run_rank(world, resolve(settings.model))
    return answer(
        settings,
        # mlx.launch gives its processes a pipe, and never closes it.
        question_of(args.prompt, args.file, may_be_piped=not is_launched()),
        environment.database if environment else None,
        copies=environment.copies if environment else None,
        go_on=args.go_on,
        as_json=args.json,
        draws=not args.plain,
        schema=read_schema(args.json_schema) if args.json_schema else None,
        world=world,
        tools=Tools(config.servers, args.allow_tool, config.tool_rounds),
    )


def _join(mode: Mode | None, settings: Settings) -> World | None:
    """Join the processes that were started with this one; None where it is the only one."""
    from m7mlx.config import ModelConfig
    from m7mlx.files.hub import resolve
    from m7mlx.parallel.world import join

    if settings.speculate != "off":
        raise InputError("--speculate: a model that is divided among processes is not speculated on; leave it out")
    return join(mode, lambda: ModelConfig.from_folder(resolve(settings.model)))
