"""Texts that become vectors on the engine's thread, a pass at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import mlx.core as mx

from m7mlx.arrays import raw_bytes
from m7mlx.embedding import Pooling, passes
from m7mlx.errors import InputError
from m7mlx.model import Mistral
from m7mlx.prompt import check_prompt


class EmbeddingJob:
    """The texts of one request.

    vectors    what comes of them, in order; set on the asker's event loop
    is_wanted  whether anybody waits for them; any thread may say that nobody does
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        prompts: Sequence[Sequence[int]],
        pooling: Pooling,
        normalize: bool,
    ) -> None:
        self._loop, self._prompts, self._pooling, self._normalize = loop, prompts, pooling, normalize
        self.vectors: asyncio.Future[list[bytes]] = loop.create_future()
        self.is_wanted = True
        self._found: dict[int, bytes] = {}
        self._passes: Iterator[Mapping[int, mx.array]] | None = None

    def advance(self, model: Mistral) -> bool:
        """Take one pass, on the engine's thread; return whether the job has ended."""
        if not self.is_wanted:
            return True
        try:
            if self._passes is None:
                self._passes = self._begin(model)
            found = next(self._passes, None)
        except Exception as error:  # of this request alone
            self.fail(error)
            return True
        if found is not None:
            self._found |= {number: bytes(raw_bytes(vector)) for number, vector in found.items()}
            return False
        self._tell(partial(self.vectors.set_result, [self._found[i] for i in range(len(self._prompts))]))
        return True

    def fail(self, error: Exception) -> None:
        """End the job with an error."""
        self._tell(partial(self.vectors.set_exception, error))

    def _begin(self, model: Mistral) -> Iterator[Mapping[int, mx.array]]:
        if model.exchange is not None:
            raise InputError("a model that is divided among processes embeds no texts; serve it on one machine")
        empty = model.new_cache()
        for ids in self._prompts:
            check_prompt(model, ids, empty)
        return passes(model, self._prompts, pooling=self._pooling, normalize=self._normalize)

    def _tell(self, end: partial[None]) -> None:
        def told() -> None:
            if not self.vectors.done():
                end()

        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
            self._loop.call_soon_threadsafe(told)


class EmbeddingJobs:
    """Jobs that take turns, on the engine's thread."""

    def __init__(self) -> None:
        self._jobs: deque[EmbeddingJob] = deque()

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, job: EmbeddingJob) -> None:
        """Put a job behind the others."""
        self._jobs.append(job)

    def advance(self, model: Mistral) -> bool:
        """Take a pass of the job whose turn it is; return whether there are more."""
        job = self._jobs.popleft() if self._jobs else None
        if job is not None and not job.advance(model):
            self._jobs.append(job)
        return bool(self._jobs)

    def fail(self, error: Exception) -> None:
        """End all jobs with an error."""
        while self._jobs:
            self._jobs.popleft().fail(error)
