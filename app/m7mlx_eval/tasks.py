"""Tasks of lm-evaluation-harness, its own and local files, run with the adapter."""

from __future__ import annotations

import difflib
import logging
import os
import random
import socket
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np

from m7mlx.errors import InputError, M7Error, NotFoundError, RunError
from m7mlx.paths import user_path
from m7mlx_eval.foreign_code import refuse_foreign_code

if TYPE_CHECKING:
    from m7mlx_eval.adapter import M7LM

# Seconds that the Hub may take to answer before data is looked for on this machine alone.
_REACHED_WITHIN = 5.0
_RESAMPLED = 1000  # times, where a metric's standard error is estimated in that way


@dataclass(frozen=True)
class Selection:
    """The tasks to run, and how to run them.

    names         of the harness (tasks, groups, patterns), or YAML files
    include_path  a folder of more task files
    num_fewshot   examples before each question; None as the task says
    limit         questions of each task; None all
    chat          ask in the model's chat format, with `system` before it; examples are turns
    allow_code    let tasks run what the model writes, and programs of their own: `!function` of
                  files that are not the harness's, metrics that are fetched, templates without a
                  sandbox
    """

    names: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat: bool = False
    system: str | None = None
    allow_code: bool = False


def prepare() -> None:
    """Quieten the harness before it is imported, and keep it from waiting for a Hub out of reach.

    It and its libraries are told by environment variables alone. Raises InputError if it is not
    installed.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # we have a bar of our own
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork a process that holds a model
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        import datasets
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(f"--tasks needs the extra eval ({error.name}): pip install 'm7mlx[eval]'") from None
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for name in ("datasets", "evaluate", "huggingface_hub", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not _hub_answers():
        import evaluate.config
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        evaluate.config.HF_EVALUATE_OFFLINE = True


def _hub_answers() -> bool:
    """Return whether the Hub can be reached; if not, each task would retry for half a minute."""
    place = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if getproxies():
        return True  # the way to it is the proxy's business
    with suppress(OSError):
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname or "", port), _REACHED_WITHIN).close()
        return True
    return False


def run_tasks(make: Callable[[], M7LM], selection: Selection) -> dict[str, Any]:
    """Run tasks; return the harness's results as it names them: "results", "groups", "samples" …

    make  gives the model, once the tasks are known to be there

    Raises NotFoundError for a task that does not exist or whose data cannot be reached, InputError
    for one that runs code or a wrong task file, RunError for what fails in the harness.
    """
    if selection.allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        return _evaluate(make, selection)
    with refuse_foreign_code():
        return _evaluate(make, selection)


def _evaluate(make: Callable[[], M7LM], selection: Selection) -> dict[str, Any]:
    found = _find_tasks(selection)
    for name, task in found["tasks"].items():
        _check_code(name, bool(getattr(task, "UNSAFE_CODE", False)), selection)
        _set_fewshot(task, selection.num_fewshot)
    lm = make()
    from lm_eval.evaluator import evaluate

    random.seed(0)  # the harness's own seeds: its results depend on them where it draws examples
    np.random.seed(1234)
    try:
        with redirect_stdout(StringIO()):  # the harness prints; stdout is for the results
            results: dict[str, Any] = evaluate(
                lm,
                found,
                limit=selection.limit,
                bootstrap_iters=_RESAMPLED,
                system_instruction=selection.system,
                apply_chat_template=selection.chat,
                fewshot_as_multiturn=selection.chat,
                confirm_run_unsafe_code=selection.allow_code,
            )
    except (M7Error, MemoryError):
        raise
    except Exception as error:  # of a task's own code and data, whatever they do
        raise RunError(f"lm-evaluation-harness failed: {type(error).__name__}: {error}") from error
    return results


def _find_tasks(selection: Selection) -> dict[str, Any]:
    """Return the harness's tasks. Raises NotFoundError, InputError."""
    from lm_eval.tasks import TaskManager

    include = selection.include_path
    if include is not None and not user_path(include).is_dir():
        raise NotFoundError(f"--include-path: there is no folder {include}")
    folder = str(user_path(include)) if include else None
    manager = TaskManager(include_path=folder, include_defaults=False)
    # The harness's own are 14,000, which take seconds to read.
    if any(not _known(manager, name) for name in selection.names):
        manager = TaskManager(include_path=folder)
    names: list[str] = []
    for name in selection.names:
        if not (matching := _known(manager, name)):
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            raise NotFoundError(f"there is no task {name!r}" + (f"; there is {', '.join(near)}" if near else ""))
        names += matching
    for name in names:
        entry = manager.task_index.get(name)
        _check_code(name, bool(entry and (entry.cfg or {}).get("unsafe_code")), selection)
    try:
        found: dict[str, Any] = manager.load(list(dict.fromkeys(names)))
    except (ConnectionError, FileNotFoundError) as error:
        raise NotFoundError(f"the data of {', '.join(selection.names)} cannot be reached: {error}") from error
    except M7Error:
        raise
    except Exception as error:  # what a task file can do wrong is without end
        raise InputError(f"{', '.join(selection.names)} cannot be loaded: {type(error).__name__}: {error}") from error
    return found


def _known(manager: Any, name: str) -> list[str]:
    """Return the tasks that a name stands for: itself, a file, or what a pattern matches."""
    if name.endswith((".yaml", ".yml")):
        path = user_path(name)
        if not path.is_file():
            raise NotFoundError(f"there is no task file {name}")
        return [str(path)]
    matching: list[str] = manager.match_tasks([name])
    return matching


def _check_code(name: str, runs_code: bool, selection: Selection) -> None:
    """Raise InputError for a task that runs what the model writes, unless that is allowed."""
    if runs_code and not selection.allow_code:
        raise InputError(
            f"{name} runs programs that the model writes, with all that you may do on this machine; "
            "if you want that, in a container at best: --allow-code"
        )


def _set_fewshot(task: Any, asked: int | None) -> None:
    """Set the number of examples as the harness's own command does; some tasks never get any."""
    given = task.get_config("num_fewshot")
    if given is None or (asked is not None and given != 0):
        task.set_config(key="num_fewshot", value=asked or 0)
    task.set_fewshot_seed(seed=1234)
