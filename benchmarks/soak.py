"""Sixty-four clients for minutes, who ask, leave and come back.

No answer may be lost or crossed, and no memory lost.

    python benchmarks/soak.py [--model FOLDER] [--clients 64] [--minutes 3]

Without --model it is a small one with random weights and a window of 16. Before the server starts,
the library answers every question alone, greedily. Then each client asks one after another:
streamed or whole, one answer or several, with stop texts, a JSON schema or a tool that must be
called; a quarter leave, before the first token or in the middle. Every answer that comes must be
the library's, letter for letter; of one that was left, its beginning.

Rounding in a batch differs by some 1e-5 of a logit, so a near tie could fall the other way: only
questions are asked in whose answers the first token is ahead of the second by at least 0.001 at
every step. Under a grammar the margin is not told; a near tie there would count as a wrong answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tried_server import NAME, PERSON, serving, settled, small_model

TOKENS = 24
MARGIN = 1e-3  # of a log probability
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": PERSON}}
_BY_KIND: dict[str, dict[str, Any]] = {
    "text": {"max_tokens": TOKENS},
    "schema": {
        "max_tokens": 8 * TOKENS,
        "response_format": {"type": "json_schema", "json_schema": {"schema": PERSON}},
    },
    "tool": {"max_tokens": 8 * TOKENS, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
}


@dataclass(frozen=True)
class Question:
    """A question, and the answer that the library gives to it alone."""

    kind: str
    text: str
    answer: str

    def body(self) -> dict[str, Any]:
        said = [{"role": "user", "content": self.text}]
        return {"model": NAME, "messages": said, "temperature": 0, **_BY_KIND[self.kind]}


@dataclass
class Tally:
    """The outcome of all requests."""

    # Answered, left, refused (429; asked again).
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def questions(folder: Path, count: int) -> list[Question]:
    """`count` of them with the library's answers."""
    from m7mlx import load
    from m7mlx.constrain import Constraint, json_constraint
    from m7mlx.request import Request
    from m7mlx.sampling import Sampling
    from m7mlx.scheduler import Scheduler
    from m7mlx.tools.calls import MARK
    from m7mlx.tools.schema import calls_schema

    model, tokenizer = load(folder)
    scheduler = Scheduler(model, tokenizer, rows=1)

    def alone(ids: list[int], tokens: int, constraint: Constraint | None) -> tuple[str, float]:
        scheduler.add(Request(ids, Sampling(), tokens, logprobs=2, constraint=constraint))
        text, margin, more = "", 1.0, True
        while more:
            told, more = scheduler.step()
            for _, piece in told:
                text += piece.text
                for scored in piece.logprobs if constraint is None else ():
                    margin = min(margin, scored.top[0][1] - scored.top[1][1])
        return text, margin

    found: list[Question] = []
    mark = tokenizer.control_id(MARK)
    draw = random.Random(0)
    words = ("why", "stone", "river", "seven", "lamp", "green", "ship", "and", "door")
    while len(found) < count:
        kind = ("text", "text", "text", "schema", "tool" if mark is not None else "text")[len(found) % 5]
        text = f"{len(found)}: {' '.join(draw.choices(words, k=draw.randint(1, 60)))}?"
        constraint: Constraint | None = None
        if kind == "tool" and mark is not None:
            ids = [*tokenizer.chat.encode([{"role": "user", "content": text}], [TOOL]), mark]
            constraint = json_constraint(tokenizer, calls_schema([TOOL["function"]], parallel=False))
        else:
            ids = tokenizer.chat.encode([{"role": "user", "content": text}])
            constraint = json_constraint(tokenizer, PERSON) if kind == "schema" else None
        answer, margin = alone(ids, _BY_KIND[kind]["max_tokens"], constraint)
        if margin >= MARGIN and answer:
            found.append(Question(kind, text, answer))
    return found


def said(message: dict[str, Any]) -> str:
    """The text of a message or delta; a call's name and arguments as the model wrote them."""
    calls = message.get("tool_calls") or []
    if not calls:
        return message.get("content") or ""
    parts = []
    for call in calls:
        if name := call["function"].get("name"):
            parts.append(f'[{{"name":"{name}","arguments":')
        parts.append(call["function"]["arguments"])
    return "".join(parts)


def tight(text: str) -> str:
    """Take out spaces and the end of a list of calls: they are not told between parts of a call."""
    return re.sub(r"\s", "", text).removesuffix("}]")


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    question: Question,
    draw: random.Random,
    tally: Tally,
    plain: bool = False,
) -> None:
    """Ask one question in one of many ways; with `plain` for one answer, and wait for it."""
    body, expected = question.body(), question.answer
    stream, n = draw.random() < 0.6, 1 if plain else draw.choice((1, 1, 1, 2, 3))
    if question.kind == "text" and draw.random() < 0.3 and len(expected) > 12:
        stop = expected[len(expected) // 2 :][:4]
        body["stop"], expected = [stop, "never said"], expected[: expected.find(stop)]
    body |= {"stream": stream, "n": n}
    leaves = "" if plain else draw.choice(("early", "middle", "", "", "", "", "", ""))
    after = draw.uniform(0, 0.3) if leaves == "early" else None
    events = draw.randint(1, 12) if leaves == "middle" and stream else None
    texts = [""] * n
    while True:
        try:
            async with asyncio.timeout(after), session.post(f"{url}/v1/chat/completions", json=body) as response:
                if response.status == 429:
                    tally.ended["refused"] += 1
                    await response.read()
                    await asyncio.sleep(draw.uniform(0.2, 1.5))
                    continue
                if response.status != 200:
                    tally.failed.append(f"{response.status}: {await response.text()}")
                    return
                if stream:
                    whole = await _read(response, texts, events)
                else:
                    data, whole = await response.json(), True
                    for choice in data["choices"]:
                        texts[choice["index"]] = said(choice["message"])
        except TimeoutError:
            whole = False
        except (aiohttp.ClientError, ValueError) as error:
            tally.failed.append(repr(error))
            return
        break
    tally.ended["answered" if whole else "left"] += 1
    for text in texts:
        if question.kind == "tool":
            text, wanted = tight(text), tight(expected)
        else:
            wanted = expected
        if text != wanted if whole else not wanted.startswith(text):
            tally.wrong.append(f"{question.kind} {body}: {text!r} is not {wanted!r}")


async def _read(response: aiohttp.ClientResponse, texts: list[str], events: int | None) -> bool:
    """Take a stream; return False if it is left after some `events`.

    Raises ValueError for one that does not end well.
    """
    count = 0
    async for line in response.content:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"]["message"])
            for choice in event["choices"]:
                texts[choice["index"]] += said(choice["delta"])
            count += 1
            if count == events:
                response.close()
                return False
        elif line.startswith(b"data: [DONE]"):
            return True
    raise ValueError("the stream broke off")


async def soak(url: str, asked: list[Question], clients: int, seconds: float, seed: int = 0) -> Tally:
    """All clients until the time is over."""
    tally, until = Tally(), time.monotonic() + seconds
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600), connector=connector) as session:

        async def client(number: int) -> None:
            draw = random.Random(f"{seed} {number}")
            while time.monotonic() < until:
                await ask(session, url, draw.choice(asked), draw, tally)

        await asyncio.gather(*map(client, range(clients)))
    return tally


async def _watch(process: int, sizes: list[float]) -> None:
    while True:
        shown = await asyncio.to_thread(subprocess.check_output, ["ps", "-o", "rss=", "-p", str(process)])
        sizes.append(int(shown) / 1e3)
        await asyncio.sleep(1)


async def _run(url: str, process: int, asked: list[Question], clients: int, seconds: float) -> None:
    await soak(url, asked, clients, seconds / 10, seed=1)  # until memory is what it is
    sizes: list[float] = []
    watching = asyncio.create_task(_watch(process, sizes))
    tally = await soak(url, asked, clients, seconds)
    watching.cancel()
    left = await settled(url)
    after = Tally()
    async with aiohttp.ClientSession() as session:
        for question in asked[:5]:
            await ask(session, url, question, random.Random(0), after, plain=True)
    third = len(sizes) // 3
    first, last = statistics.median(sizes[:third]), statistics.median(sizes[-third:])
    print(f"{clients} clients, {seconds:.0f} s: {dict(tally.ended)}, {after.ended['answered']} of 5 afterwards")
    wrong, failed = tally.wrong + after.wrong, tally.failed + after.failed
    print(f"wrong: {len(wrong)}, failed: {len(failed)}, open at the end: {left:g}")
    print(f"resident memory, MB: first third {first:.1f}, last third {last:.1f}, most {max(sizes):.1f}")
    for line in (wrong + failed)[:10]:
        print(line, file=sys.stderr)
    if wrong or failed or left or after.ended["answered"] != 5:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="MODEL")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--questions", type=int, default=60)
    args = parser.parse_args()
    from m7mlx.files.hub import resolve

    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve(args.model) if args.model else small_model(Path(scratch))
        asked = questions(folder, args.questions)
        with serving(folder, "--rows", "16", "--queue", "32") as (url, process):
            asyncio.run(_run(url, process, asked, args.clients, args.minutes * 60))


if __name__ == "__main__":
    main()
