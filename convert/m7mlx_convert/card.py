"""The model card: README.md of the folder a conversion writes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version

from m7mlx.terminal import shown
from m7mlx_convert.plan import Plan, stored_as


def model_card(plan: Plan, repo: str | None, commit: str | None, command: Sequence[str]) -> str:
    """Write a card in the Hub's form: what it is, where it comes from, how to make and run it.

    repo     the Hub repository it was converted from, if it was one
    commit   the revision of that repository
    command  what made the model
    """
    source = plan.source
    name = _plain(source.name)
    front = ["library_name: mlx", "pipeline_tag: text-generation"]
    if repo:
        front.append(f"base_model: {json.dumps(repo)}")
    if licence := shown(source.licence or "").strip(" \"'"):
        is_word = re.fullmatch(r"[A-Za-z][\w.+-]*", licence)
        front.append(f"license: {licence if is_word else json.dumps(licence)}")
    front += ["tags:", "- mlx", f"- {source.config.model_type}"]
    schemes = {stored_as(p.scheme, p.dtype): None for p in plan.parameters if p.scheme}
    numbers = f"quantised ({'; '.join(schemes)})" if schemes else "not quantised"
    numbers += f", {plan.bits_per_weight:.2f} bits a weight"
    origin = f"; converted from [{repo}](https://huggingface.co/{repo})" if repo else ""
    origin += f" at revision {commit}" if repo and commit else ""
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
    """Take out of a text what Markdown would understand."""
    return shown(re.sub(r"[`<>\[\]]", " ", text))
