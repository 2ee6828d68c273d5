"""Reading, quantising and writing at once, in order, within bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import mlx.core as mx

from m7mlx.arrays import on_cpu
from m7mlx_convert.plan import IN_FLIGHT, PlannedParameter
from m7mlx_convert.writer import TensorBytes

Computed = tuple[PlannedParameter, list[TensorBytes]]


def compute_ahead(parameters: Iterable[PlannedParameter]) -> Iterator[Computed]:
    """Yield each parameter with its bytes, in order; compute later ones while the caller writes."""
    with _workers() as pool:
        waiting: deque[tuple[PlannedParameter, Future[list[TensorBytes]]]] = deque()
        in_flight = 0
        try:
            for planned in parameters:
                while waiting and in_flight + planned.memory > IN_FLIGHT:
                    in_flight -= waiting[0][0].memory
                    yield _take_first(waiting)
                waiting.append((planned, pool.submit(_compute, planned)))
                in_flight += planned.memory
            while waiting:
                yield _take_first(waiting)
        finally:
            for _, result in waiting:
                result.cancel()


def _take_first(waiting: deque[tuple[PlannedParameter, Future[list[TensorBytes]]]]) -> Computed:
    planned, result = waiting.popleft()
    return planned, result.result()


def _compute(planned: PlannedParameter) -> list[TensorBytes]:
    """Read and compute a parameter, evaluated here: MLX's streams belong to their thread."""
    computed = [TensorBytes.of(array) for array in planned.arrays()]
    mx.clear_cache()  # MLX would keep every freed buffer for reuse
    return computed


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Start threads that compute: two on the CPU backend, where an operation runs on one core."""
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
