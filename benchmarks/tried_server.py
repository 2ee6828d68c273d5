"""A server that the benchmarks try hard: its start, its end, and what it still has open."""

from __future__ import annotations

import asyncio
import re
import sys
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

import aiohttp
import common

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))  # for small models and schemas
from models import random_weights, small_config, write_folder
from schemas import PERSON, object_of

from m7mlx.tokens.load import load_tokenizer

__all__ = [
    "NAME",
    "PERSON",
    "WORDS",
    "calling_model",
    "object_of",
    "open_requests",
    "serving",
    "settled",
    "small_model",
]

NAME = "soak"
WORDS = "Hello, here I am."
_CLOSING = ('"}}', '"}', "}}", "}", '"]', "]", '"')  # what comes first, if the grammar lets it
_TEMPLATE = """\
{%- for message in messages %}<|{{ message.role }}|> {{ message.content }}
{% endfor -%}
{%- set said = messages | map(attribute="content") | join -%}
{{ "Calls" if "function signatures" in said and "<tool_response>" not in said else "Says" }}"""


def small_model(folder: Path) -> Path:
    """Write a model with random weights, a window of 16 and Mistral's v3 tokenizer."""
    return write_folder(folder / "small", small_config(vocab_size=32768, sliding_window=16, n_layers=2))


def calling_model(folder: Path) -> Path:
    """Write a model that calls a tool, where there are any, and says `WORDS` to what that gave.

    Its template ends a prompt with the word that says which; each token tells the next one. In a
    call the grammar says what must come; texts, lists and objects end as soon as it lets them.
    """
    config = small_config(vocab_size=32768, sliding_window=16, n_layers=1)
    weights = random_weights(config)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.0.{name}.weight"][:] = 0
    weights["model.norm.weight"][:] = 1
    embed, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embed[:], head[:] = 0, 0
    embed[:, 0] = 1  # what all have in common
    found = write_folder(folder / "calling", config)
    (found / "chat_template.jinja").write_text(_TEMPLATE)
    tokenizer = load_tokenizer(found)
    for token in range(3, config.vocab_size):
        text = tokenizer.decode([token])
        head[token, 0] = 20 - _CLOSING.index(text) if text in _CLOSING else 0
    (end,) = tokenizer.eos_ids
    head[end, 0] = 30
    chains = [*tokenizer.encode("Calls <tool_call>\n")], [*tokenizer.encode(f"Says {WORDS}"), end]
    for channel, (before, after) in enumerate(pair for chain in chains for pair in pairwise(chain)):
        embed[before, channel + 1], head[after, channel + 1] = 2, 40
    return write_folder(found, config, weights)


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
