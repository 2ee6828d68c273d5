"""What every API needs to answer: the engine's pieces, and errors that clients read."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import ClassVar, Protocol

from m7mlx import Piece, Request
from m7mlx.errors import BusyError, InputError
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.engine import LateError
from m7mlx_serve.errors import ApiError, refusal, report

_RETRY_SECONDS = 5


@dataclass(frozen=True)
class Answerer:
    """What answers requests, and the bounds of each answer.

    ask         the engine's, which yields (number of the answer, piece)
    max_tokens  most tokens of an answer
    seconds     most time for all answers to a request
    """

    tokenizer: Tokenizer
    ask: Callable[[Sequence[Request], float], AsyncGenerator[tuple[int, Piece], None]]
    max_tokens: int | None
    seconds: float

    def token_limit(self, wanted: int | None) -> int | None:
        """The most tokens of an answer, of which a client wants so many."""
        return min((limit for limit in (wanted, self.max_tokens) if limit is not None), default=None)

    async def pieces(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (number of the answer, piece) of all answers as they come.

        Raises ApiError if one of them fails; the others are cancelled.
        """
        try:
            async with aclosing(self.ask(requests, self.seconds)) as pieces:
                async for index, piece in pieces:
                    if piece.finish_reason in ("failed", "cancelled"):
                        raise _failure(piece)
                    yield index, piece
        except BusyError as error:
            raise ApiError(429, str(error), "rate_limit_exceeded", {"Retry-After": str(_RETRY_SECONDS)}) from None
        except LateError as error:
            raise ApiError(504, str(error)) from None
        except InputError as error:
            raise ApiError(400, str(error)) from None


class Answers(Protocol):
    """All answers to one request, as an API's clients read them.

    One of the two methods is called, once.
    """

    stream_type: ClassVar[str]  # the media type of a stream

    async def whole(self) -> Iterator[str]:
        """The JSON of all answers, in pieces none of which takes long to write. Raises ApiError."""

    def stream(self) -> AsyncGenerator[str, None]:
        """What is sent while the answers come.

        What fails before the first token raises ApiError; later, it is an event of its own.
        """


def _failure(piece: Piece) -> ApiError:
    """The error that a piece ends with. What was not foreseen is not told to strangers."""
    if isinstance(piece.error, InputError):
        return refusal(piece.error)
    if piece.finish_reason == "cancelled":
        return ApiError(503, "the server is shutting down", "shutting_down")
    if isinstance(piece.error, LateError):
        return ApiError(504, str(piece.error))
    if piece.error is not None:
        report(piece.error)
    return ApiError(500, "the request failed on the way")
