"""How many cores this process may use, for kernels that keep all of them busy.

M7MLX_THREADS   that many threads, whatever the machine has
"""

from __future__ import annotations

import os
from pathlib import Path

from m7mlx.errors import InputError

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of work in a period, or "max"


def count_cores() -> int:
    """Return the cores to use: whole ones, since two threads of one core share what multiplies.

    Counts those that this process may run on, and no more than a container's share of time.
    """
    asked = os.environ.get("M7MLX_THREADS", "")
    if asked:
        if not asked.isdecimal() or not 0 < int(asked) <= 1024:
            raise InputError(f"M7MLX_THREADS: {asked!r:.40} is no number of threads")
        return int(asked)
    return max(1, min(_whole_cores(os.sched_getaffinity(0)), _quota()))


def _whole_cores(processors: set[int]) -> int:
    """Return how many cores these processors are; one each where nothing says otherwise."""
    cores = set()
    for number in processors:
        try:
            cores.add((_TOPOLOGY / f"cpu{number}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(str(number))
    return len(cores)


def _quota() -> int:
    try:
        share, period = _QUOTA.read_text().split()
        return max(1, -(-int(share) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # no container, or no limit
        return 1024
