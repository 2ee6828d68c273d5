"""The routes, and what is measured of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m7mlx.errors import InputError
from m7mlx_serve.admission import SPACE_KEY, Admission
from m7mlx_serve.answering import Answerer, Answers, VectorAnswers
from m7mlx_serve.anthropic import count, messages
from m7mlx_serve.anthropic.answers import CountAnswers, MessageAnswers
from m7mlx_serve.bodies import SCOPE_KEY
from m7mlx_serve.endpoint import ReadRequest
from m7mlx_serve.endpoints import ENDPOINTS, error_response
from m7mlx_serve.errors import ApiError, refusal, report
from m7mlx_serve.listing import ollama_routes, openai_routes
from m7mlx_serve.metrics import Counted, Metrics
from m7mlx_serve.models import Loaded, Models
from m7mlx_serve.named import named_model
from m7mlx_serve.ollama import chat as ollama_chat
from m7mlx_serve.ollama import embed, generate
from m7mlx_serve.ollama.answers import EmbedAnswers, EmbedOneAnswers, OllamaAnswers
from m7mlx_serve.openai import chat, embeddings, text
from m7mlx_serve.openai.answers import OpenAIAnswers
from m7mlx_serve.openai.embedding_answers import EmbeddingAnswers
from m7mlx_serve.openapi import PATHS, document
from m7mlx_serve.pages import page_routes
from m7mlx_serve.readers import SMALL
from m7mlx_serve.responses import create
from m7mlx_serve.responses.answers import ResponseAnswers
from m7mlx_serve.responses.held import HeldResponses
from m7mlx_serve.responses.routes import response_routes
from m7mlx_serve.sending import SentVectors, Stream, send_whole
from m7mlx_serve.vector_room import VectorRoom

_Found = TypeVar("_Found")
# What answers each endpoint. Unlike `m7mlx_serve.endpoints`, it needs MLX.
_ANSWERS: Mapping[str, Callable[[Answerer, ReadRequest], Answers | VectorAnswers]] = {
    messages.ENDPOINT.path: MessageAnswers,
    count.ENDPOINT.path: CountAnswers,
    ollama_chat.ENDPOINT.path: OllamaAnswers,
    generate.ENDPOINT.path: OllamaAnswers,
    embed.ENDPOINT.path: EmbedAnswers,
    embed.ONE_ENDPOINT.path: EmbedOneAnswers,
    chat.ENDPOINT.path: OpenAIAnswers,
    text.ENDPOINT.path: OpenAIAnswers,
    embeddings.ENDPOINT.path: EmbeddingAnswers,
}


@dataclass(frozen=True)
class Served:
    """How long answers may be.

    max_tokens  most tokens of an answer
    seconds     most time for the answers to a request
    """

    max_tokens: int | None = None
    seconds: float = 600.0


class Server:
    """An ASGI application over models."""

    def __init__(
        self,
        models: Models,
        served: Served,
        hosts: Collection[str],
        keys: Collection[str] = (),
        origins: Collection[str] = (),
    ) -> None:
        self._models, self._served = models, served
        self._metrics, self._held, self._room = Metrics(models), HeldResponses(), VectorRoom()
        self._answers: Mapping[str, Callable[[Answerer, ReadRequest], Answers | VectorAnswers]] = {
            **_ANSWERS,
            create.ENDPOINT.path: partial(ResponseAnswers, self._held),
        }
        self._naming = ThreadPoolExecutor(1, "m7mlx-name")  # large bodies one by one: it holds the interpreter
        self._tells_reuse = with_key = bool(keys)
        routes = [
            *(Route(path, self._answer, methods=["POST"]) for path in self._answers),
            *openai_routes(models),
            *ollama_routes(models),
            *response_routes(self._held, lambda request: request.scope[SPACE_KEY]),
            Route("/health", self._show_health),
            Route("/metrics", self._show_metrics),
            Route("/openapi.json", lambda request: JSONResponse(document(tuple(models.catalog.names), with_key))),
            *page_routes(models.catalog, with_key),
        ]
        app = Starlette(
            routes=routes,
            middleware=[Middleware(Admission, posts=ENDPOINTS, hosts=hosts, keys=keys, origins=origins)],
            exception_handlers={
                ApiError: _api_error,
                InputError: _input_error,
                HTTPException: _http_error,
                RecursionError: _too_deep,
                Exception: _unforeseen,
            },
            lifespan=self._lifespan,
        )
        self.app = Counted(app, self._metrics, {*PATHS, *(route.path for route in routes)})

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        unloading = asyncio.create_task(self._models.unload_idle())
        yield
        unloading.cancel()
        self._models.close()
        self._naming.shutdown(wait=False, cancel_futures=True)

    # --- answers ----------------------------------------------------------------------------------

    async def _answer(self, request: Request) -> Response:
        """Answer what was sent to an endpoint of an API."""
        path = request.scope["path"]
        data = (await request.receive())["body"]  # and no copy of it stays
        async with AsyncExitStack() as using:
            use = self._models.use(await self._named(path, data))
            model = await _unless_gone(request, using.enter_async_context(use))
            space: str = request.scope[SPACE_KEY]
            held = self._held.mentioned(space, data) if path == create.ENDPOINT.path else {}
            reading = model.readers.read(path, data, model.engine.tokenizer, held)
            del data
            read = await _unless_gone(request, reading)
            del reading
            request.scope[SCOPE_KEY].drop()
            answers = self._answers[path](self._answerer(model, space), read)
            if isinstance(answers, VectorAnswers):
                return await _unless_gone(request, self._made(answers))
            if not read.body.stream:
                return send_whole(await _unless_gone(request, answers.whole()))
            events = answers.stream()
            # The first event is awaited here, so that a refusal has a status of its own.
            first = await _unless_gone(request, anext(events))
            return Stream(first, events, answers.stream_type, using.pop_all())

    async def _made(self, answers: VectorAnswers) -> Response:
        """Vectors, for which there has to be room until their client has read them."""
        place = await self._room.take(answers.size)
        try:
            return SentVectors(await answers.whole(), place)
        except BaseException:
            place.release()
            raise

    async def _named(self, path: str, data: bytes) -> str:
        """The model that a body names; "" where there is but one, which whoever reads it checks."""
        if len(self._models.catalog.names) == 1:
            return ""
        is_ollamas = path.startswith("/api/")
        if len(data) <= SMALL:
            return named_model(data, is_ollamas)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._naming, named_model, data, is_ollamas)

    def _answerer(self, model: Loaded, space: str) -> Answerer:
        engine = model.engine
        return Answerer(
            model.name,
            engine.context,
            engine.tokenizer,
            partial(self._metrics.ask, engine),
            self._served.max_tokens,
            self._served.seconds,
            space,
            self._tells_reuse,
            embed=partial(self._metrics.embed, engine),
            width=engine.width,
        )

    # --- everything else --------------------------------------------------------------------------

    async def _show_health(self, request: Request) -> Response:
        alive = self._models.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _unless_gone(request: Request, answer: Awaitable[_Found]) -> _Found:
    """Wait for an answer, unless its client leaves: then give it up and raise ApiError."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ApiError(499, "the client has gone")
    finally:
        for task in (work, left):
            task.cancel()
        await asyncio.gather(work, left, return_exceptions=True)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(request.scope["path"], error)


async def _input_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, InputError)
    return error_response(request.scope["path"], refusal(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    words = {
        404: f"there is nothing at {path[:100]}; /docs says what this server understands",
        405: f"{path[:100]} does not take {request.method}; /docs says what it takes",
    }
    message = words.get(error.status_code, str(error.detail))
    return error_response(path, ApiError(error.status_code, message, None, dict(error.headers or {})))


async def _too_deep(request: Request, error: Exception) -> Response:
    return error_response(request.scope["path"], ApiError(400, "the request nests too deep"))


async def _unforeseen(request: Request, error: Exception) -> Response:
    report(error)
    return error_response(request.scope["path"], ApiError(500, "the request failed on the way"))
