"""The documentation: every promise has its test, every public name its reference.

The site builds.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import m7mlx

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"
PAGE = (DOCS / "faults.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(test_\w+\.py)`|`(test_\w+)`|`(\w+)`")


def functions_of(file: Path) -> set[str]:
    """The test functions of a file."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {name for name in functions if name.startswith("test_")}


def rows() -> list[str]:
    """The rows of all tables, without their heads."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    heads = {n for n, line in enumerate(lines) if re.fullmatch(r"\|(?: ?-+ ?\|)+", line)}
    return [line for n, line in enumerate(lines) if n not in heads and n + 1 not in heads]


def shown_by(row: str) -> list[tuple[str, str]]:
    """(file, function) of each test that a row names; a file counts for all that follow it."""
    found, file = [], ""
    for named, function, other in NAMED.findall(row.rsplit("|", 2)[1]):
        assert not other, f"{other!r} is no test: {row}"
        file = named or file
        if function:
            found.append((file, function))
    return found


def test_every_test_that_is_named_exists() -> None:
    there = {file.name: functions_of(file) for file in TESTS.rglob("test_*.py")}
    named = [test for row in rows() for test in shown_by(row)]
    assert len(named) > 100
    assert not [test for test in named if test[1] not in there.get(test[0], ())]


def test_every_promise_names_the_test_that_shows_it() -> None:
    assert not [row for row in rows() if not shown_by(row)]
    assert not [row for row in rows() if len(row.split(" | ")) != 3]


@pytest.mark.docs
def test_the_site_builds_and_shows_every_public_name(tmp_path: Path) -> None:
    root = DOCS.parent
    config = (root / "mkdocs.yml").read_text(encoding="utf-8")
    config = config.replace("[., convert, app]", f"[{root}]")
    (tmp_path / "mkdocs.yml").write_text(config, encoding="utf-8")
    shutil.copytree(DOCS, tmp_path / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", "mkdocs.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    names = set(m7mlx.__all__) - {"__version__"}
    assert not [name for name in names if f'id="m7mlx.{name}"' not in page]
