"""The jobs of worker_jobs.py, on a system whose SIGIO ends no process by itself."""

from worker_jobs import handler

from m7mlx import worker_process

__all__ = ["handler"]

worker_process.SIGIO_ENDS = False
