"""Time to the first token of a long conversation that is opened again in m7mlx-chat.

    python benchmarks/reopening.py --model demo --tokens 30000
    python benchmarks/reopening.py --model shape

"shape" is a model with random weights whose keys and values are those of Mistral 7B v0.1 in shape:
32 layers, 8 heads of 128 numbers, a window of 4,096. It computes little besides.

A conversation is read and answered; the engine ends and copies it to the disk; the next one goes on
from the copy. Models without a window keep the last 4,096 tokens here (`max_kv_size`). Beside the
seconds on the clock stand those of the processor, which count where other work runs on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from m7mlx_chat.engine import Engine
from m7mlx_chat.events import Done, Event, Failed, Note, Ready
from m7mlx_chat.settings import Settings

from m7mlx import Request
from m7mlx.config import ModelConfig
from m7mlx.files.hub import resolve

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))  # for a small model
from models import small_config, write_folder

WORDS = "In the long report the committee said that the river had risen again after the rain. "


def main() -> None:
    """Run the benchmark and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, a Hub repository or an alias (%(default)s)")
    parser.add_argument("--tokens", type=int, default=30_000, help="of the conversation, about (%(default)s)")
    parser.add_argument("--whole", action="store_true", help="keep all tokens, not the last 4,096")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 16], help="of the copies (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder(Path(scratch), _shape()) if args.model == "shape" else resolve(args.model)
        measure(folder, args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Read, end, open again, for each of the bits."""
    config = ModelConfig.from_folder(folder)
    slides = config.window is None and not args.whole
    messages: list[dict[str, Any]] = [{"role": "user", "content": WORDS * (args.tokens // 17)}]
    for bits in args.bits:
        settings = Settings(kv_bits=16, max_kv_size=4096 if slides else None, kv_disk_bits=bits)
        with tempfile.TemporaryDirectory() as scratch:
            copies = Path(scratch) / "copies"
            with engine_of(folder, settings, copies) as engine:
                first = ask(engine, messages)
                ended = time.perf_counter()
            print(f"{bits} bits: ended, with the copy, in {time.perf_counter() - ended:.2f} s")
            nbytes = sum(file.stat().st_size for file in copies.iterdir())
            answer = {"role": "assistant", "content": first.done.text, "ids": first.done.ids}
            again = [*messages, answer, {"role": "user", "content": "And then?"}]
            with engine_of(folder, settings, copies) as engine:
                back = ask(engine, again)
            print(f"  a file of {nbytes / 1e6:,.1f} MB")
            tell("read anew", first)
            tell("opened again", back)


@contextmanager
def engine_of(folder: Path, settings: Settings, copies: Path) -> Iterator[Engine]:
    """An engine with its model loaded, until it has ended."""
    engine = Engine(copies=copies)
    engine.start()
    engine.load(folder, settings)
    wait(engine, Ready)
    try:
        yield engine
    finally:
        engine.close(timeout=60)


def _shape() -> ModelConfig:
    size = {"hidden_size": 64, "intermediate_size": 64, "n_layers": 32, "n_heads": 8, "n_kv_heads": 8}
    return small_config(**size, head_dim=128, vocab_size=32768, sliding_window=4096, max_position_embeddings=32768)


class Asked(NamedTuple):
    """How an answer ended, and the seconds until then: on the clock, and of the processor."""

    done: Done
    clock: float
    processor: float


def ask(engine: Engine, messages: list[dict[str, Any]]) -> Asked:
    """Ask for one token in the one conversation that there is."""
    began, used = time.perf_counter(), time.process_time()
    engine.submit(Request(messages, max_tokens=1, space="1"))
    done = wait(engine, Done)
    assert isinstance(done, Done)
    return Asked(done, time.perf_counter() - began, time.process_time() - used)


def wait(engine: Engine, kind: type[Event]) -> Event:
    """Wait for an event of a kind."""
    while True:
        for event in engine.drain(1.0):
            if isinstance(event, Failed | Note):
                raise SystemExit(event.message)
            if isinstance(event, kind):
                return event


def tell(name: str, asked: Asked) -> None:
    """Print a line."""
    cost = asked.done.statistics
    held = f"{cost.reused_tokens:,} of {cost.prompt_tokens:,} tokens held"
    print(f"  {name:14} {asked.clock:8.2f} s, {asked.processor:8.2f} s of the processor; {held}", flush=True)


if __name__ == "__main__":
    main()
