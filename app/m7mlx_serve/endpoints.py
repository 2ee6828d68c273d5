"""The endpoints of all APIs, by path."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from m7mlx_serve.anthropic import count, messages
from m7mlx_serve.endpoint import Endpoint
from m7mlx_serve.errors import ApiError
from m7mlx_serve.ollama import chat as ollama_chat
from m7mlx_serve.ollama import embed, generate, show
from m7mlx_serve.openai import chat, embeddings, text
from m7mlx_serve.responses import create

ENDPOINTS: Mapping[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        *(chat.ENDPOINT, text.ENDPOINT, create.ENDPOINT, embeddings.ENDPOINT),
        *(messages.ENDPOINT, count.ENDPOINT),
        *(ollama_chat.ENDPOINT, generate.ENDPOINT, embed.ENDPOINT, embed.ONE_ENDPOINT),
        show.ENDPOINT,
    )
}


# Whose clients ask for other paths that begin like this.
_APIS = {"/api/": ollama_chat.ENDPOINT, "/v1/messages": messages.ENDPOINT}


def error_response(path: str, error: ApiError) -> Response:
    """The response that tells a client of `path` what is wrong, in the words of its API."""
    endpoint = ENDPOINTS.get(path) or next((one for start, one in _APIS.items() if path.startswith(start)), None)
    return error.response() if endpoint is None else error.response(endpoint.error(error))
