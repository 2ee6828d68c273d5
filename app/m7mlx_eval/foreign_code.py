"""Programs in tasks: the harness's own run, a stranger's does not, unless the user says so.

This is the one place that knows private names of lm_eval.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from m7mlx.errors import InputError, RunError


@contextmanager
def refuse_foreign_code() -> Iterator[None]:
    """Let tasks run the harness's own code alone, within the block.

    What a task file names as `!function` or class is the harness's or refused, a metric is never
    fetched, and templates are sandboxed. Raises InputError where a task asks for another program,
    RunError for a harness that is built in another way.
    """
    # Slow to import, and only once `prepare` has settled what they show.
    import evaluate
    import lm_eval
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils
    from lm_eval.tasks import _yaml_loader as loader

    home = Path(lm_eval.__file__).resolve().parent
    sandbox = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=utils.env.keep_trailing_newline
    )
    sandbox.filters.update(utils.env.filters)

    refused: list[InputError] = []  # the harness takes some of them for another fault

    def refuse(what: str) -> NoReturn:
        refused.append(
            InputError(f"{what}, a program that could do all that you may do; if you trust it: --allow-code")
        )
        raise refused[-1]

    def function(qual: str, base_dir: Path) -> Any:
        if not Path(base_dir).resolve().is_relative_to(home):
            refuse(f"a task file in {base_dir} runs !function {qual}")
        return known["_import_func_in_yml"](qual, base_dir)

    def module(path: Path) -> Any:
        if not Path(path).resolve().is_relative_to(home):
            refuse(f"a task file runs {path}")
        return known["_load_module_with_cache"](path)

    def metric(path: str, *_: Any, **__: Any) -> NoReturn:
        refuse(f"the metric {path!r} is not the harness's own")

    changes: list[tuple[Any, str, Any]] = [
        (loader, "_import_func_in_yml", function),
        (loader, "_load_module_with_cache", module),
        (utils, "env", sandbox),
        (evaluate, "load", metric),
    ]
    if any(not hasattr(where, name) for where, name, _ in changes):  # run nothing unchecked
        raise RunError("this version of lm_eval is not known here; take one of 0.4.12 and later, before 0.5")
    known = {name: getattr(where, name) for where, name, _ in changes}
    try:
        for where, name, value in changes:
            setattr(where, name, value)
        yield
    except Exception:
        if refused:
            raise refused[0] from None
        raise
    finally:
        for where, name, _ in changes:
            setattr(where, name, known[name])
