"""What every API needs to answer: the engine's pieces, and errors that clients read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from m7mlx import Piece, Request, Sampling, Stats
from m7mlx.embedding import Pooling
from m7mlx.errors import BusyError, InputError
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.endpoint import ReadRequest
from m7mlx_serve.engine import EndedError, LateError
from m7mlx_serve.errors import ApiError, refusal, report

_RETRY_SECONDS = 5
_TEMPERATURE = 0.7  # OpenAI's default is 1, which is too wild for models of this size


@dataclass(frozen=True)
class Answerer:
    """What answers requests, and the bounds of each answer.

    model       the name of the model that answers
    context     the most tokens of a conversation
    ask         the engine's, which yields (number of the answer, piece)
    max_tokens  most tokens of an answer
    seconds     most time for all answers to a request
    space       whose clients they are: nothing that is held for one space is used for another
    tells_reuse whether they may know how much of a prompt was held: with a key, it was their own
    embed       the engine's, which makes vectors of prompts
    width       the numbers of a vector
    """

    model: str
    context: int
    tokenizer: Tokenizer
    ask: Callable[[Sequence[Request], float], AsyncGenerator[tuple[int, Piece], None]]
    max_tokens: int | None
    seconds: float
    space: str = ""
    tells_reuse: bool = False
    embed: Callable[[Sequence[Sequence[int]], Pooling, bool, float], Awaitable[list[bytes]]] | None = None
    width: int = 0

    def reused(self, *costs: Stats) -> int:
        """How many tokens of a prompt its clients are told were held when its answers came."""
        return min((cost.reused_tokens for cost in costs), default=0) if self.tells_reuse else 0

    async def vectors(
        self,
        read: ReadRequest,
        pooling: Pooling = "mean",
        normalize: bool = True,
        dimensions: int | None = None,
    ) -> list[bytes]:
        """The vectors of all prompts, each as float32 numbers. Raises ApiError."""
        if dimensions not in (None, self.width):
            reason = f"the vectors of this model have {self.width} numbers, and a part of them says nothing"
            raise ApiError(400, f"dimensions: {reason}; leave it out")
        assert self.embed is not None
        try:
            return await self.embed(read.prompts.ids, pooling, normalize, self.seconds)
        except BusyError as error:
            raise _busy(error) from None
        except LateError as error:
            raise ApiError(504, str(error)) from None
        except EndedError as error:
            raise ApiError(503, str(error), "shutting_down") from None
        except InputError as error:
            raise refusal(error) from None

    def answers(self, read: ReadRequest) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (number of the answer, piece), `n` answers to each prompt. Raises as `pieces`."""
        return self.pieces(self.requests(read))

    def requests(self, read: ReadRequest) -> list[Request]:
        """What the engine is asked for: one request for each answer.

        With a seed each answer differs from the others, and is the same every time.
        """
        wanted, prompts = read.body.wanted(), read.prompts
        limits = [limit for limit in (wanted.max_tokens, self.max_tokens) if limit is not None]
        sampling = Sampling(
            temperature=_TEMPERATURE if wanted.temperature is None else wanted.temperature,
            top_p=1.0 if wanted.top_p is None else wanted.top_p,
            top_k=wanted.top_k or 0,
            min_p=wanted.min_p or 0.0,
            repetition_penalty=wanted.repetition_penalty or 1.0,
            presence_penalty=wanted.presence_penalty or 0.0,
            frequency_penalty=wanted.frequency_penalty or 0.0,
            seed=wanted.seed,
        )
        one = Request(
            (),
            sampling,
            max_tokens=min(limits, default=None),
            stop=wanted.stop,
            at_start=prompts.at_start,
            logit_bias=wanted.logit_bias,
            logprobs=wanted.logprobs,
            prompt_logprobs=wanted.prompt_logprobs,
            schema=prompts.schema,
            prediction=prompts.prediction,
            space=self.space,
        )
        numbered = [(ids, index) for ids in prompts.ids for index in range(wanted.n)]
        seeds = [None if wanted.seed is None else (wanted.seed + index) % (1 << 64) for _, index in numbered]
        return [
            replace(one, prompt=ids, sampling=replace(sampling, seed=seed))
            for (ids, _), seed in zip(numbered, seeds, strict=True)
        ]

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
            raise _busy(error) from None
        except LateError as error:
            raise ApiError(504, str(error)) from None
        except InputError as error:
            raise refusal(error) from None


def numbers_in_json(vector: bytes) -> str:
    """A vector of float32 numbers as JSON, with as many digits as they have."""
    return f"[{', '.join(map('{:.9g}'.format, array('f', vector)))}]"


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


class VectorAnswers(ABC):
    """Vectors, which come at once, where a stream is asked for, too."""

    def __init__(self, answerer: Answerer, read: ReadRequest) -> None:
        self._answerer, self._read = answerer, read

    @property
    def size(self) -> int:
        """The bytes of all vectors."""
        return 4 * self._answerer.width * len(self._read.prompts.ids)

    @abstractmethod
    async def whole(self) -> Generator[str, None, None]:
        """The JSON, in pieces that are written one by one as the client reads them."""


def _busy(error: BusyError) -> ApiError:
    return ApiError(429, str(error), "rate_limit_exceeded", {"Retry-After": str(_RETRY_SECONDS)})


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
