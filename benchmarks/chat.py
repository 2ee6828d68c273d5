"""The cost of the chat's interface while a model answers.

Streaming overhead, event-loop lag, and opening a long history.

    python benchmarks/chat.py --model demo [--rounds 5] [--tokens 200]

Headless generation and generation inside the running app (Textual's own headless driver, which
draws everything) alternate in one process each, with the same model, question and length.
"""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUESTION = "Tell me a long story about a fox, with many chapters, a table of contents and some code in Python."


def headless(model: str, tokens: int) -> dict[str, float]:
    """Tokens per second of the engine alone."""
    from m7mlx_chat.engine import Engine
    from m7mlx_chat.events import Done
    from m7mlx_chat.settings import Settings

    from m7mlx import Request
    from m7mlx.files.hub import resolve

    engine = Engine()
    engine.start()
    engine.load(resolve(model), Settings())
    engine.submit(Request([{"role": "user", "content": QUESTION}], max_tokens=tokens))
    while True:
        for event in engine.drain(0.5):
            if isinstance(event, Done):
                engine.close()
                return {"tps": event.statistics.generation_tps, "first": event.statistics.time_to_first_token}


async def in_app(model: str, tokens: int) -> dict[str, float]:
    """Measure it inside the app; `lag` has the longest times that the event loop was late."""
    from m7mlx_chat.app import ChatApp
    from m7mlx_chat.config import Config
    from m7mlx_chat.engine import Engine
    from m7mlx_chat.environment import Environment
    from m7mlx_chat.launch import keep_collections_short
    from m7mlx_chat.session import Session
    from m7mlx_chat.settings import Settings
    from m7mlx_chat.store import Store
    from m7mlx_chat.view import Parts

    from m7mlx.files.hub import resolve

    keep_collections_short()
    lags: list[float] = []
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "chats.db") as store:
        engine = Engine()
        session = Session(store, engine, Settings(max_tokens=tokens))
        environment = Environment(Path(folder), Path(folder) / "config.toml", Path(folder) / "chat.log")
        app = ChatApp(Parts(engine, session, Config(environment.config), environment), folder=resolve(model))
        async with app.run_test(size=(120, 40)) as pilot:
            while session.ready is None:
                await pilot.pause(0.1)
            session.ask(QUESTION)
            await app.show_all()
            while session.under_way is not None:
                before = time.perf_counter()
                await asyncio.sleep(0.005)
                lags.append(time.perf_counter() - before - 0.005)
            found = store.message(session.line[-1]).statistics
        engine.close()
    lags.sort()
    return {
        "tps": found["generation_tps"],
        "first": found["time_to_first_token"],
        "lag_max_ms": 1000 * lags[-1],
        "lag_p99_ms": 1000 * lags[int(len(lags) * 0.99)],
    }


async def opening(count: int) -> dict[str, float]:
    """Measure the seconds until a stored conversation of `count` messages is open and drawn."""
    from m7mlx_chat.app import ChatApp
    from m7mlx_chat.config import Config
    from m7mlx_chat.engine import Engine
    from m7mlx_chat.environment import Environment
    from m7mlx_chat.session import Session
    from m7mlx_chat.settings import Settings
    from m7mlx_chat.store import Store
    from m7mlx_chat.store.rows import Node, Tree
    from m7mlx_chat.view import Parts

    text = "Some **words** of an answer, with `code` in it.\n\n- one\n- two\n\n```python\nx = 1\n```\n"
    nodes = tuple(
        Node(parent=i - 1 if i else None, role="assistant" if i % 2 else "user", text=f"{i}: {text}", created=1e9 + i)
        for i in range(count)
    )
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "chats.db") as store:
        tree = Tree(title="long", automatic=False, created=1e9, updated=1e9, leaf=count - 1, nodes=nodes)
        (conversation,) = store.plant([tree])
        engine = Engine()
        session = Session(store, engine, Settings())
        environment = Environment(Path(folder), Path(folder) / "config.toml", Path(folder) / "chat.log")
        app = ChatApp(Parts(engine, session, Config(environment.config), environment), folder=Path("/nowhere"))
        async with app.run_test(size=(120, 40)) as pilot:
            await pilot.pause()
            started = time.perf_counter()
            await app.open_conversation(conversation)
            await pilot.pause()
            seconds = time.perf_counter() - started
        engine.close()
    return {"seconds": seconds}


def measured(run: str, model: str, tokens: int) -> dict[str, float]:
    """The figures of one run, in this process."""
    if run == "headless":
        return headless(model, tokens)
    return asyncio.run(in_app(model, tokens) if run == "app" else opening(10_000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--run", choices=("headless", "app", "opening"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measured(args.run, args.model, args.tokens)))
        return
    results: dict[str, list[dict[str, float]]] = {"headless": [], "app": [], "opening": []}
    for _ in range(args.rounds):
        for kind, found in results.items():
            command = [sys.executable, __file__, "--run", kind, "--model", args.model, "--tokens", str(args.tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    for kind, found in results.items():
        for name in found[0]:
            values = sorted(one[name] for one in found)
            print(f"{kind:<10}{name:<12}{statistics.median(values):10.3f}  ({values[0]:.3f} to {values[-1]:.3f})")
    ratios = [a["tps"] / b["tps"] for a, b in zip(results["app"], results["headless"], strict=True)]
    print(f"tok/s in the app / headless: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
