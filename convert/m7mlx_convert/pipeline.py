"""Reading, quantising and writing at once, in order, within bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import mlx.core as mx

from m7mlx.arrays import on_cpu
from m7mlx_convert.plan import IN_FLIGHT, Step
from m7mlx_convert.writer import Piece


def computed(steps: Iterable[Step]) -> Iterator[tuple[Step, list[Piece]]]:
    """Each step with the bytes it gives, in order; later ones are computed while the caller writes earlier ones."""
    with _workers() as pool:
        waiting: deque[tuple[Step, Future[list[Piece]]]] = deque()
        in_flight = 0
        try:
            for step in steps:
                while waiting and in_flight + step.memory > IN_FLIGHT:
                    in_flight -= waiting[0][0].memory
                    yield _first(waiting)
                waiting.append((step, pool.submit(_pieces, step)))
                in_flight += step.memory
            while waiting:
                yield _first(waiting)
        finally:
            for _, result in waiting:
                result.cancel()


def _first(waiting: deque[tuple[Step, Future[list[Piece]]]]) -> tuple[Step, list[Piece]]:
    step, result = waiting.popleft()
    return step, result.result()


def _pieces(step: Step) -> list[Piece]:
    """Read and compute one step; evaluated here, since MLX's streams belong to their thread."""
    pieces = [Piece.of(array) for array in step.arrays()]
    mx.clear_cache()  # MLX would keep every freed buffer for reuse
    return pieces


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that compute: two on the CPU backend, where an operation runs on one core."""
    count = 2 if on_cpu() else 1
    with ThreadPoolExecutor(count, "convert") as pool:
        try:
            yield pool
        finally:
            # A thread that ends with streams of its own can abort the process.
            together = threading.Barrier(count)
            for _ in range(count):
                pool.submit(_clear_streams, together)


def _clear_streams(together: threading.Barrier) -> None:
    together.wait()
    mx.clear_streams()
