"""Where bodies are read: small ones on a thread, all others in a process of its own, one after the other."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m7mlx.errors import InputError, WorkerError, WorkerMemoryError, WorkerTimeError
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.worker import Worker
from m7mlx_serve.errors import ApiError
from m7mlx_serve.reading import Asked, read, refusal
from m7mlx_serve.reading_process import asked, question

SMALL = 16 << 10  # bytes; what can be made of them takes milliseconds
_MEMORY = 2 << 30  # of the process: a million characters can be three million ids
_SECONDS, _CPU_SECONDS = 40.0, 20.0
_MODULE = "m7mlx_serve.reading_process"


class Readers:
    """Start it once; then `read` from the event loop."""

    def __init__(self, folder: Path, model: str) -> None:
        """Bodies ask for `model`, whose tokenizer lies in `folder`."""
        self._model = model
        self._worker = Worker(_MODULE, str(folder).encode(), memory=_MEMORY)
        self._here = ThreadPoolExecutor(2, "m7mlx-read")
        self._elsewhere = ThreadPoolExecutor(1, "m7mlx-read-large")  # the process does one at a time

    def start(self) -> None:
        """Returns at once; the process gets ready meanwhile."""
        self._worker.start()

    async def read(self, path: str, data: bytes, tokenizer: Tokenizer) -> Asked:
        """What a body that came for `path` asks. Raises ApiError; whoever no longer waits, gives up his place."""
        loop = asyncio.get_running_loop()
        if len(data) <= SMALL:
            return await loop.run_in_executor(self._here, self._small, path, data, tokenizer)
        return await loop.run_in_executor(self._elsewhere, self._large, path, data)

    def close(self) -> None:
        self._worker.close()
        for pool in (self._here, self._elsewhere):
            pool.shutdown(wait=False, cancel_futures=True)

    def _small(self, path: str, data: bytes, tokenizer: Tokenizer) -> Asked:
        try:
            return read(path, data, self._model, tokenizer)
        except InputError as error:
            raise refusal(error) from None

    def _large(self, path: str, data: bytes) -> Asked:
        try:
            reply = self._worker.ask(question(path, data, self._model), _SECONDS, _CPU_SECONDS)
        except WorkerTimeError:
            raise ApiError(400, "the request takes too long to read; send less") from None
        except WorkerMemoryError:
            raise ApiError(400, "the request takes too much memory to read; send less") from None
        except WorkerError:
            raise ApiError(503, "the request could not be read; try again later") from None
        return asked(path, reply)
