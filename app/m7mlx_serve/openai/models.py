"""GET /v1/models and /v1/models/{name}: the model that is served."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m7mlx_serve.errors import ApiError


def model_routes(model: str) -> list[Route]:
    """The routes that tell of `model`, which has been served since now."""
    card = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "m7mlx"}

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def show_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != model:
            raise ApiError(404, f"the model {name[:100]!r} is not served here", "model_not_found")
        return JSONResponse(card)

    return [Route("/v1/models", list_models), Route("/v1/models/{name:path}", show_model)]
