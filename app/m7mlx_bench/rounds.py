"""A run: the engines take turns, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from m7mlx.errors import M7Error, RunError
from m7mlx_bench.report import Results
from m7mlx_bench.worker import Job

_PIECE = 1 << 24  # bytes
_WITHOUT_WINDOW = ("mlx-lm", "llama.cpp")

Show = Callable[[str], None]


class Turns:
    """The engines that take turns, each with its job; what they find goes into `results`.

    job   what all of them are to do
    show  takes what is being done
    """

    def __init__(self, results: Results, job: Job, show: Show) -> None:
        self._results, self._job, self._show = results, job, show
        self._jobs: dict[str, Job] = {}

    def add(self, engine: str, find_file: Callable[[], tuple[Path, str]]) -> None:
        """Take an engine in, and find its pace; or note why it is left out.

        find_file  gives what it is to read, and a note on that
        """
        try:
            file, note = find_file()
        except M7Error as error:
            self._results.notes.append(f"{engine} left out: {error}")
            return
        if note:
            self._results.notes.append(f"{engine} {note}")
        job = replace(self._job, engine=engine, folder=str(file))
        pace = self._run(job, "first start")
        if pace is not None:
            self._jobs[engine] = replace(job, pace=pace)

    def measure(self, rounds: int) -> None:
        """Measure all engines, round by round; one that is too slow for its job in one round."""
        for number in range(1, rounds + 1):
            at = f"round {number} of {rounds}"
            self._show(f"{at}: bandwidth of the memory")
            self._results.bandwidth.append(float(run_worker("null", self._show)))
            for engine, job in list(self._jobs.items()):
                self._show(f"{at}, {engine}: reading its files once")
                _read_through(Path(job.folder))
                found = self._run(job, at)
                if found is None:
                    self._results.runs.pop(engine, None)
                    del self._jobs[engine]
                    continue
                self._results.runs.setdefault(engine, []).append(found)
                if found["cut"]:
                    self._results.notes.append(
                        f"{engine} was measured in one round, with fewer tokens where {job.seconds:g} s did not do "
                        f"for all: {', '.join(found['cut'])}"
                    )
                    del self._jobs[engine]
        self._note_differences()

    def _note_differences(self) -> None:
        """Note what engines do otherwise, or not at all."""
        for engine, runs in self._results.runs.items():
            if engine in _WITHOUT_WINDOW and self._results.model["window"]:
                self._results.notes.append(f"{engine} attends to the whole sequence: it ignores the window")
            far = [n for n in self._results.positions if not any(str(n) in run["decode"] for run in runs)]
            if far:
                self._results.notes.append(
                    f"{engine} gets to a position only by reading, which takes more than {self._job.seconds:g} s to "
                    f"{', '.join(f'{n:,}' for n in far)}"
                )

    def _run(self, job: Job, at: str) -> Any:
        """Run a job; return what it finds, or None, with a note, if it fails."""
        try:
            return json.loads(run_worker(job.dumps(), lambda doing: self._show(f"{at}, {job.engine}: {doing}")))
        except RunError as error:
            self._results.notes.append(f"{job.engine} failed: {error}")
            return None


def run_worker(job: str, show: Show) -> str:
    """Return the last line that a worker prints, and show what it is doing until then.

    Raises RunError with its last complaint.
    """
    command = [sys.executable, "-m", "m7mlx_bench.worker", job]
    last = ""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert worker.stdout is not None
        try:
            for line in worker.stdout:
                if line.startswith('{"doing"'):
                    show(json.loads(line)["doing"])
                else:
                    last = line
            status = worker.wait()
        finally:
            worker.kill()
            worker.wait()
            worker.stdout.close()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if status:
        raise RunError(said[-1] if said else f"exit status {status}")
    return last


def _read_through(place: Path) -> None:
    """Read a file, or all files of a folder, so that every engine starts with them in memory."""
    for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
        with file.open("rb") as opened:
            while opened.read(_PIECE):
                pass
