"""GET /api/tags, /api/ps and /api/version: which model there is."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m7mlx_serve.engine import Engine
from m7mlx_serve.ollama.answers import describe, now

_VERSION = "0.12.0"  # of Ollama, whose API this is


def ollama_routes(model: str, engine: Engine) -> list[Route]:
    """The routes that tell of `model`."""
    name = model if ":" in model else f"{model}:latest"
    size, since = engine.weights, now()

    async def list_tags(request: Request) -> Response:
        tag: dict[str, Any] = {"name": name, "model": name, "modified_at": since, "size": size, "digest": "0" * 64}
        return JSONResponse({"models": [tag | {"details": describe()}]})

    async def show_version(request: Request) -> Response:
        return JSONResponse({"version": _VERSION})

    return [Route("/api/tags", list_tags), Route("/api/ps", list_tags), Route("/api/version", show_version)]
