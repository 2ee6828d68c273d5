"""GET /v1/models and /v1/models/{name}: the model that is served."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m7mlx_serve.engine import Engine
from m7mlx_serve.errors import ApiError


def model_routes(model: str, engine: Engine) -> list[Route]:
    """The routes that tell of `model`, which has been served since now."""
    created = int(time.time())

    def card() -> dict[str, Any]:
        """The model, in the words of OpenAI's clients and of Mistral's."""
        return {
            "id": model,
            "object": "model",
            "created": created,
            "owned_by": "m7mlx",
            "type": "base",
            "capabilities": {"completion_chat": True, "completion_fim": False, "function_calling": True},
            "max_context_length": engine.context,
        }

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card()]})

    async def show_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != model:
            raise ApiError(404, f"the model {name[:100]!r} is not served here", "model_not_found")
        return JSONResponse(card())

    return [Route("/v1/models", list_models), Route("/v1/models/{name:path}", show_model)]
