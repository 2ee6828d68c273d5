"""A server that the benchmarks try hard: its start, its end, and what it still has open."""

from __future__ import annotations

import asyncio
import re
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import aiohttp
import common

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))  # for small models and schemas
from models import random_weights, small_config, write_folder
from schemas import PERSON, object_of

__all__ = ["NAME", "PERSON", "ending_model", "object_of", "open_requests", "serving", "settled", "small_model"]

NAME = "soak"


def small_model(folder: Path) -> Path:
    """Write a model with random weights, a window of 16 and Mistral's v3 tokenizer."""
    return write_folder(folder / "small", small_config(vocab_size=32768, sliding_window=16, n_layers=2))


def ending_model(folder: Path) -> Path:
    """Write such a model whose answers end by themselves after some tokens, as agents expect."""
    config = small_config(vocab_size=32768, sliding_window=16, n_layers=1)
    weights = random_weights(config)
    # All tokens have one number in common, which the end's row of the head alone looks at.
    weights["model.embed_tokens.weight"][:, 0] = 12
    weights["model.layers.0.self_attn.o_proj.weight"] *= 0.05
    weights["model.norm.weight"][0] = 1
    head = weights["lm_head.weight"]
    head[:, 0] = head[:800] = 0  # the control tokens do not come either
    head[2, 0] = 1.3  # one time in five
    return write_folder(folder / "ending", config, weights)


def serving(folder: Path, *options: str) -> AbstractContextManager[tuple[str, int]]:
    """Start a server of the model `NAME`; yield its address and the number of its process."""
    return common.serving("--model", str(folder), "--name", NAME, "--prefix-disk", "0", *options)


async def open_requests(url: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
        found = re.search(r"^m7mlx_open_requests (\S+)", await answer.text(), re.M)
    assert found
    return float(found[1])


async def settled(url: str) -> float:
    """Requests still open when everybody has had time to leave."""
    for _ in range(100):
        if not (count := await open_requests(url)):
            break
        await asyncio.sleep(0.1)
    return count
