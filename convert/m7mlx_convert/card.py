"""The model card: README.md of the folder a conversion writes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from m7mlx_convert.source import Source


def model_card(source: Source, origin: str, quantization: Mapping[str, Any] | None, command: Sequence[str]) -> str:
    """A card in the Hub's form: what it is, where it comes from, how it was made, how to run it."""
    front = ["library_name: mlx", "pipeline_tag: text-generation"]
    if "/" in origin and not origin.startswith(("/", ".", "~")) and origin.count("/") == 1:
        front.append(f"base_model: {origin}")
    if source.licence:
        front.append(f"license: {source.licence}")
    front += ["tags:", "- mlx", "- mistral"]
    numbers = (
        f"quantised to {quantization['bits']} bits in groups of {quantization['group_size']}"
        if quantization
        else "not quantised"
    )
    made = f"\nMade with m7mlx {version('m7mlx')}:\n\n```sh\n{shlex.join(command)}\n```\n" if command else ""
    return (
        "---\n" + "\n".join(front) + f"\n---\n\n# {source.name}\n\n"
        f"{source.name} in MLX's format, {numbers}; converted from `{origin}`.\n{made}\n"
        "```sh\nm7mlx-chat --model <this folder>\n```\n\n"
        "```python\nfrom m7mlx import load, generate\n\n"
        'model, tokenizer = load("<this folder>")\n'
        'print(generate(model, tokenizer, [{"role": "user", "content": "Hello"}]))\n```\n'
    )
