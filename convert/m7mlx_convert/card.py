"""The model card: README.md of the folder a conversion writes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from m7mlx_convert.source import Source, shown


def model_card(source: Source, config: Mapping[str, Any], repo: str | None, command: Sequence[str]) -> str:
    """A card in the Hub's form: what it is, where it comes from, how it was made, how to run it.

    config   the result's config.json
    repo     the Hub repository it was converted from, if it was one
    command  what made it
    """
    name = _plain(source.name)
    front = ["library_name: mlx", "pipeline_tag: text-generation"]
    if repo:
        front.append(f"base_model: {json.dumps(repo)}")
    if licence := shown(source.licence or "").strip(" \"'"):
        is_word = re.fullmatch(r"[A-Za-z][\w.+-]*", licence)
        front.append(f"license: {licence if is_word else json.dumps(licence)}")
    front += ["tags:", "- mlx", f"- {source.config.model_type}"]
    scheme = config.get("quantization")
    numbers = f"quantised to {scheme['bits']} bits in groups of {scheme['group_size']}" if scheme else "not quantised"
    origin = f"; converted from [{repo}](https://huggingface.co/{repo})" if repo else ""
    made = (
        f"Made with m7mlx {version('m7mlx')}:\n\n```sh\n{shlex.join(map(_plain, command))}\n```\n\n"
        if command
        else ""
    )
    return (
        "---\n" + "\n".join(front) + f"\n---\n\n# {name}\n\n"
        f"{name} in MLX's format, {numbers}{origin}.\n\n{made}"
        "Chat with it in the terminal, from the folder that holds this file:\n\n"
        "```sh\npip install m7mlx\nm7mlx-chat --model .\n```\n\n"
        "Or from Python:\n\n"
        "```python\nfrom m7mlx import load, generate\n\n"
        'model, tokenizer = load(".")\n'
        'print(generate(model, tokenizer, [{"role": "user", "content": "Hello"}]))\n```\n'
    )


def _plain(text: str) -> str:
    """Text that is no Markdown."""
    return shown(re.sub(r"[`<>\[\]]", " ", text))
