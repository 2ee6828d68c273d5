"""How long reading will take, by how long it took before."""

from __future__ import annotations

import time

_LEAST = 32  # tokens: a few tell nothing of the pace


class Pace:
    """Tokens of prompts that the model reads in a second, as it was last."""

    def __init__(self) -> None:
        self._per_second: float | None = None
        self._began = 0.0  # reading of now

    def learn(self, tokens: int, per_second: float) -> None:
        """Take note of a prompt that was read."""
        if tokens >= _LEAST and per_second > 0:
            self._per_second = per_second

    def forget(self) -> None:
        """Forget what was learnt: another model reads from now on."""
        self._per_second = None

    def seconds(self, tokens: int) -> float | None:
        """How long so many tokens will take; None where nothing has been read yet."""
        return None if self._per_second is None else tokens / self._per_second

    def left(self, done: int, total: int) -> float | None:
        """How long the rest of a prompt will take, of which `done` tokens have been read by now."""
        now = time.monotonic()
        if done == 0:
            self._began = now
        elif now > self._began > 0.0:
            self.learn(done, done / (now - self._began))
        return self.seconds(total - done)


def about(seconds: float) -> str:
    """A duration as people say it: "about 12 s", "about 3 min"."""
    if seconds < 60:
        return f"about {max(1, round(seconds))} s"
    if seconds < 3600:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
