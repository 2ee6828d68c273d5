"""Where bodies are read: small ones on a thread, the others one by one in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

from m7mlx.errors import InputError, WorkerError, WorkerMemoryError, WorkerTimeError
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.worker import Worker
from m7mlx_serve.endpoint import ReadRequest
from m7mlx_serve.errors import ApiError, refusal
from m7mlx_serve.reading import read
from m7mlx_serve.reading_process import pack_question, unpack_reply

SMALL = 16 << 10  # bytes; to read so many takes milliseconds, whatever they say
_MEMORY = 2 << 30  # of the process: a million characters can be three million ids
_SECONDS, _CPU_SECONDS = 40.0, 20.0
_MODULE = "m7mlx_serve.reading_process"


class Readers:
    """Threads and a process that read bodies. Start them; then `read` from the event loop."""

    def __init__(self, folder: Path, model: str) -> None:
        """Bodies ask for `model`, whose tokenizer lies in `folder`."""
        self._model = model
        self._worker = Worker(_MODULE, str(folder.absolute()).encode(), memory=_MEMORY)
        self._small_pool = ThreadPoolExecutor(2, "m7mlx-read")
        self._large_pool = ThreadPoolExecutor(1, "m7mlx-read-large")  # for one process

    def start(self) -> None:
        """Start the process, and let it get ready in the background."""
        self._worker.start()

    async def read(
        self,
        path: str,
        data: bytes,
        tokenizer: Tokenizer,
        held: Mapping[str, bytes] = MappingProxyType({}),
    ) -> ReadRequest:
        """What a body that came for `path` asks for. Raises ApiError.

        held  conversations that it may go on from, by id (`Prompts.held`)

        A caller that is cancelled gives up its place in the line.
        """
        loop = asyncio.get_running_loop()
        if len(data) + sum(map(len, held.values())) <= SMALL:
            return await loop.run_in_executor(self._small_pool, self._read_small, path, data, tokenizer, held)
        return await loop.run_in_executor(self._large_pool, self._read_large, path, data, held)

    def close(self) -> None:
        """End the process and the threads."""
        self._worker.close()
        for pool in (self._small_pool, self._large_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def _read_small(
        self,
        path: str,
        data: bytes,
        tokenizer: Tokenizer,
        held: Mapping[str, bytes],
    ) -> ReadRequest:
        try:
            return read(path, data, self._model, tokenizer, held)
        except InputError as error:
            raise refusal(error) from None

    def _read_large(self, path: str, data: bytes, held: Mapping[str, bytes]) -> ReadRequest:
        try:
            reply = self._worker.ask(pack_question(path, data, self._model, held), _SECONDS, _CPU_SECONDS)
        except WorkerTimeError:
            raise ApiError(400, "the request takes too long to read; send less") from None
        except WorkerMemoryError:
            raise ApiError(400, "the request takes too much memory to read; send less") from None
        except WorkerError:
            raise ApiError(503, "the request could not be read; try again later") from None
        return unpack_reply(path, reply)
