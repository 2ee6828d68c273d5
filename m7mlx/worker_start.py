"""Starting the process of a `Worker`: Python with little in it, cut off from this process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec

from m7mlx.errors import WorkerDiedError

_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "TZ")
# For glibc: one arena, since each takes 64 MB of the addresses, which are bounded; and large blocks
# go back to the system when a job frees them.
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
_START = """
import json, sys, types
given = json.loads(sys.argv[1])
sys.path[:] = given["path"]
for name, places in given["packages"].items():
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = places
from m7mlx.worker_process import serve
serve(given["module"], given["memory"], given["rope"])
"""


class Ends:
    """Our ends of the two sockets of a process, and its ends until it has them.

    line, its_line  requests and replies
    rope, its_rope  nothing: that it ends is what it says
    """

    def __init__(self) -> None:
        self.line, self.its_line = socket.socketpair()
        try:
            self.rope, self.its_rope = socket.socketpair()
        except OSError:
            self.line.close()
            self.its_line.close()
            raise

    def given(self) -> None:
        """Close the process's ends here: it has them."""
        self.its_line.close()
        self.its_rope.close()

    def close(self) -> None:
        """Close our ends, which ends the process."""
        self.line.close()
        self.rope.close()


def start_process(module: str, memory: int) -> tuple[subprocess.Popen[bytes], Ends]:
    """Start a process that serves `module` (`m7mlx.worker_process.serve`).

    Returns it and our ends of its sockets. Raises WorkerDiedError.
    """
    places = {name: _places(name) for name in {"m7mlx", module.partition(".")[0]}}
    given = {
        "path": [os.path.abspath(place) for place in sys.path],
        "packages": {name: [os.path.abspath(p) for p in found] for name, found in places.items() if found},
        "module": module,
        "memory": memory,
    }
    try:
        ends = Ends()
    except OSError as error:
        raise WorkerDiedError(f"a worker process cannot be started: {error}") from None
    given["rope"] = ends.its_rope.fileno()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", "-c", _START, json.dumps(given)],
            stdin=ends.its_line.fileno(),
            pass_fds=[ends.its_rope.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_MALLOC | {k: os.environ[k] for k in _ENVIRONMENT if k in os.environ},
            start_new_session=True,  # Ctrl-C in a terminal is not for it
        )
    except (OSError, ValueError) as error:
        ends.close()
        raise WorkerDiedError(f"a worker process cannot be started: {error}") from None
    finally:
        ends.given()
    return process, ends


def _places(package: str) -> list[str]:
    """Return the folders of a package; none for a module.

    In a worker process packages are stand-ins (`_START`), which have no spec.
    """
    if package in sys.modules:
        return list(getattr(sys.modules[package], "__path__", ()))
    spec = find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec else []
