"""The endpoints of all APIs, by path."""

from __future__ import annotations

from collections.abc import Mapping

from m7mlx_serve.endpoint import Endpoint
from m7mlx_serve.openai import chat, text

ENDPOINTS: Mapping[str, Endpoint] = {endpoint.path: endpoint for endpoint in (chat.ENDPOINT, text.ENDPOINT)}
