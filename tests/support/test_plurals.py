"""No message says "1 tokens": numbers with what they count are written by `counted`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from m7mlx.units import counted

ROOT = Path(__file__).parents[2]
_PLURALS = re.compile(
    r" (?:bytes|characters|conversations|documents|files|greedy tokens|layers|lines|messages|models|samples|"
    r"sequences|slots|titles|tokens|versions|windows)\b"
)
# What is never one: limits, and what is told only where there are several.
_MANY = {
    *("n", "size", "sizes[1]", "len(tokens)", "tensors", "names", "length", "2 * _SEQUENCE", "self.max_length"),
    *("error.tokens", "most", "vocab_size", "world.size", "len(tensors)", "_MOST >> 20"),
}


def test_one_and_many() -> None:
    assert [counted(n, "token") for n in (0, 1, 2, 1000)] == ["0 tokens", "1 token", "2 tokens", "1,000 tokens"]
    assert counted(1, "copy", "copies") == "1 copy" and counted(2, "copy", "copies") == "2 copies"


def numbers_before_plurals(path: Path) -> Iterator[str]:
    """Values of f-strings that stand before a plural and may be 1."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            for value, after in zip(node.values, node.values[1:], strict=False):
                text = after.value if isinstance(after, ast.Constant) else ""
                if isinstance(value, ast.FormattedValue) and isinstance(text, str) and _PLURALS.match(text):
                    shown = ast.unparse(value.value)
                    if shown not in _MANY and not shown.lstrip("_").isupper():
                        yield f"{path.relative_to(ROOT)}:{node.lineno}: {shown}{text[:20]}"


def test_no_number_has_a_plural_of_its_own() -> None:
    paths = [path for folder in ("app", "convert") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 100
    assert [found for path in paths for found in numbers_before_plurals(path)] == []
