"""Grammars of requests, prepared on threads of their own: others do not wait for that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from m7mlx import Request
from m7mlx.errors import BusyError
from m7mlx.request import with_grammar
from m7mlx.tokens.tokenizer import Tokenizer

_SCHEMAS = 8  # requests whose schemas are being prepared or wait for it, so that others find places


class Grammars:
    """Prepares grammars for the requests of one engine."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4, "m7mlx-grammar")
        self._waiting = 0  # requests that wait for one; event loops alone

    async def prepared(self, requests: Sequence[Request], tokenizer: Tokenizer) -> Sequence[Request]:
        """The requests, all of one schema or none, with a grammar. Raises BusyError, InputError."""
        if not requests[0].needs_grammar:
            return requests
        if self._waiting >= _SCHEMAS:
            raise BusyError("too many JSON schemas are being prepared; try again later")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._pool, lambda: [with_grammar(request, tokenizer) for request in requests]
            )
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Prepare no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
