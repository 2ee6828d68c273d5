"""GET and DELETE /v1/responses/{id}: a response that is held."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m7mlx_serve.errors import ApiError
from m7mlx_serve.responses.held import HeldResponses


def response_routes(held: HeldResponses, space_of: Callable[[Request], str]) -> list[Route]:
    """The routes that tell of responses, and drop them; `space_of` says whose a request is."""

    async def show(request: Request) -> Response:
        found = held.find(space_of(request), request.path_params["id"])
        if found is None:
            raise _unknown(request.path_params["id"])
        return Response(found.reply, media_type="application/json")

    async def drop(request: Request) -> Response:
        id = request.path_params["id"]
        if not held.drop(space_of(request), id):
            raise _unknown(id)
        return JSONResponse({"id": id, "object": "response", "deleted": True})

    return [
        Route("/v1/responses/{id}", show, methods=["GET"]),
        Route("/v1/responses/{id}", drop, methods=["DELETE"]),
    ]


def _unknown(id: str) -> ApiError:
    return ApiError(404, f"the response {id[:100]!r} is not held here, or not any longer", "not_found")
