"""What the chat logs of its own faults fails the test in which it happens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


def nothing_unforeseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which the chat has logged faults of its own.

    The chat outlives its own faults and logs them; a test does not, unless it looks at them and
    clears the log.
    """
    yield
    faults = [record for record in caplog.get_records("call") if record.name.startswith("m7mlx")]
    for record in faults:
        if record.exc_info and record.exc_info[1]:
            raise record.exc_info[1]
    assert not faults
