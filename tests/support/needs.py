"""What some tests need and not every machine has.

A test that is marked with a need is skipped where what it needs is not there.
"""

from __future__ import annotations

import functools
import importlib
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest

from m7mlx.errors import DownloadError
from m7mlx.files.hub import resolve


class Need(NamedTuple):
    what: str
    have: str  # how to have it
    there: Callable[[], bool]


def _importable(*modules: str) -> Callable[[], bool]:
    """Whether they can really be imported: a package may be there and not run."""

    def there() -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for module in modules:
                    importlib.import_module(module)
        except (ImportError, OSError, RuntimeError):
            return False
        return True

    return there


def _program(*names: str) -> Callable[[], bool]:
    return lambda: any(map(shutil.which, names))


def _demo() -> bool:
    try:
        resolve("demo")
    except DownloadError as error:
        if "could not fetch" in str(error):
            return False
        raise
    return True


NEEDS = {
    "oracle": Need(
        "torch, transformers and accelerate",
        "pip install -e '.[oracle]'",
        _importable("torch", "transformers", "accelerate"),
    ),
    "peft": Need(
        "PEFT, torch and transformers", "pip install -e '.[oracle]'", _importable("torch", "transformers", "peft")
    ),
    "eval": Need("lm_eval", "pip install -e '.[eval]'", _importable("lm_eval", "datasets", "pyarrow")),
    "clients": Need(
        "other programs' clients",
        "pip install -e '.[clients]'",
        _importable("agents", "anthropic", "langchain_openai", "litellm", "mistralai", "ollama"),
    ),
    "llama": Need("llama_cpp", "pip install llama-cpp-python", _importable("llama_cpp")),
    "docs": Need(
        "zensical and mkdocstrings",
        "pip install -e '.[docs]'",
        _importable("zensical", "mkdocstrings"),
    ),
    "demo": Need("the demo model", "connect to the network once", _demo),
    "tmux": Need("tmux", "brew or apt install tmux", _program("tmux")),
    "chromium": Need(
        "Chromium", "apt install chromium, or put google-chrome on the PATH", _program("chromium", "google-chrome")
    ),
}


@functools.cache
def missing(name: str) -> str:
    """Why tests that are marked with `name` cannot run, and what to do; "" where they can."""
    need = NEEDS[name]
    return "" if need.there() else f"no {need.what} here ({need.have})"


def require(name: str) -> None:
    """Skip a whole file, which imports what it needs at its top."""
    if why := missing(name):
        pytest.skip(why, allow_module_level=True)


def skip_without(marks: Iterable[pytest.Mark]) -> None:
    """Skip a test that is marked with something that is not there."""
    for mark in marks:
        if mark.name in NEEDS and (why := missing(mark.name)):
            pytest.skip(why)


def summary(skipped: Iterable[Any]) -> str:
    """One line: what was skipped, why, and how to have it run; "" where nothing was."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for report in skipped:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        reasons[reason.removeprefix("Skipped: ")].append(report.nodeid)
    told = []
    for reason, tests in reasons.items():
        files = [test.rpartition("/")[2] for test in tests if "::" not in test]
        count = len(tests) - len(files)
        those = ([f"{count} test" + "s" * (count > 1)] if count else []) + files
        told.append(f"{', '.join(those)}: {reason}")
    return "skipped: " + "; ".join(told) if told else ""
