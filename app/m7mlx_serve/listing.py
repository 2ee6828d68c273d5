"""Which models there are, loaded or not: by OpenAI's API, and by Ollama's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m7mlx_serve.errors import ApiError
from m7mlx_serve.models import Models
from m7mlx_serve.named import meant, tagged
from m7mlx_serve.ollama import show
from m7mlx_serve.ollama.answers import describe, now
from m7mlx_serve.ollama.show import ShowRequest
from m7mlx_serve.readers import SMALL
from m7mlx_serve.reading import parse

_Told = TypeVar("_Told")
_VERSION = "0.12.0"  # of Ollama, whose API this is
_FOR_GOOD = "2318-01-01T00:00:00Z"  # when a model leaves: Ollama's word for one that nobody sends away


def openai_routes(models: Models) -> list[Route]:
    """GET /v1/models and /v1/models/{name}, of models that have been served since now."""
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        """A model, in the words of OpenAI's clients and of Mistral's. Raises ApiError."""
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "m7mlx",
            "type": "base",
            "capabilities": {"completion_chat": True, "completion_fim": False, "function_calling": True},
            "max_context_length": models.about(name).context,
            "loaded": any(slot.name == name for slot in models.loaded),
        }

    def list_models(request: Request) -> Response:  # on a thread: there may be many to look at
        return JSONResponse({"object": "list", "data": _of_each(models, card)})

    def show_model(request: Request) -> Response:
        return JSONResponse(card(meant(request.path_params["name"], models.catalog.names)))

    return [Route("/v1/models", list_models), Route("/v1/models/{name:path}", show_model)]


def ollama_routes(models: Models) -> list[Route]:
    """GET /api/tags, /api/ps (those that are loaded) and /api/version; POST /api/show."""
    since = now()

    def tag(name: str, size: int) -> dict[str, Any]:
        digest = hashlib.sha256(name.encode()).hexdigest()
        told = {"name": tagged(name), "model": tagged(name), "modified_at": since, "size": size, "digest": digest}
        return told | {"details": describe()}

    def running(name: str, size: int) -> dict[str, Any]:
        told = {"size_vram": size, "expires_at": _FOR_GOOD, "context_length": models.about(name).context}
        return tag(name, size) | told

    def list_tags(request: Request) -> Response:
        return JSONResponse({"models": _of_each(models, lambda name: tag(name, models.about(name).stored))})

    async def list_loaded(request: Request) -> Response:
        return JSONResponse({"models": [running(slot.name, slot.engine.weights) for slot in models.loaded]})

    async def show_model(request: Request) -> Response:
        """What a model is; it is not loaded for that, since clients ask of all."""
        data = (await request.receive())["body"]
        if len(data) > SMALL:
            raise ApiError(400, f"the body must not exceed {SMALL:,} bytes here: it names a model, no more")
        found = models.about(meant(parse(data, ShowRequest).model, models.catalog.names))
        shown = {
            "modelfile": "",
            "parameters": "",
            "template": "",
            "details": describe(),
            "model_info": {"general.architecture": "llama", "llama.context_length": found.context},
            "capabilities": ["completion", "tools", "embedding"],
            "modified_at": now(),
        }
        return JSONResponse(shown)

    async def show_version(request: Request) -> Response:
        return JSONResponse({"version": _VERSION})

    return [
        Route("/api/tags", list_tags),
        Route("/api/ps", list_loaded),
        Route("/api/version", show_version),
        Route(show.ENDPOINT.path, show_model, methods=["POST"]),
    ]


def _of_each(models: Models, tell: Callable[[str], _Told]) -> list[_Told]:
    """What is told of each model, but for folders that hold none any more."""
    found = []
    for name in models.catalog.names:
        try:
            found.append(tell(name))
        except ApiError:
            continue
    return found
