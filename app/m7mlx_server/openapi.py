"""What this server understands, as an OpenAPI document: for programs at /openapi.json, for people at /docs."""

from __future__ import annotations

import html
import json
from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from m7mlx_server.schemas import ChatRequest, CompletionRequest

_POSTS = {
    "/v1/chat/completions": (
        ChatRequest,
        "Answer a conversation",
        "chat.completion, or chat.completion.chunk events",
    ),
    "/v1/completions": (CompletionRequest, "Go on from a text or from ids", "text_completion, whole or as events"),
}
_GETS = {
    "/v1/models": ("The model that is served", "application/json"),
    "/health": ("Whether requests can be answered", "application/json"),
    "/metrics": ("Figures for Prometheus", "text/plain"),
}
_ERRORS = {
    "400": "The request cannot be met; the message says what is wrong with it",
    "401": "A key is needed",
    "403": "Another Host or Origin than this server's",
    "404": "The model is not served here",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "429": "Too many requests are waiting; Retry-After says when to come back",
    "500": "The request failed on the way",
    "503": "The server is shutting down",
    "504": "The answer took too long",
}


def document(with_key: bool) -> dict[str, Any]:
    """The OpenAPI document; `with_key` if requests must carry one."""
    pairs = [(model, "validation") for model, *_ in _POSTS.values()]
    _, schemas = models_json_schema(pairs, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for path, (model, summary, answer) in _POSTS.items():
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
        kinds: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
        responses: dict[str, Any] = {"200": {"description": answer, "content": kinds}}
        responses |= {status: _error(reason) for status, reason in _ERRORS.items()}
        request = {"required": True, "content": body}
        paths[path] = {"post": {"summary": summary, "requestBody": request, "responses": responses}}
    for path, (summary, kind) in _GETS.items():
        refused = {status: _error(_ERRORS[status]) for status in ("401", "403")}
        paths[path] = {"get": {"summary": summary, "responses": {"200": _plain(summary, kind)} | refused}}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "m7mlx-serve", "version": version("m7mlx")},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }
    if with_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def page(with_key: bool) -> str:
    """The same to read, without a script."""
    parts = []
    data = document(with_key)
    for path, methods in data["paths"].items():
        for method, what in methods.items():
            parts.append(f"<h2><code>{method.upper()} {path}</code></h2><p>{html.escape(what['summary'])}.</p>")
    schemas = html.escape(json.dumps(data["components"]["schemas"], indent=2))
    title = '<title>m7mlx-serve: API</title><link rel="icon" href="data:,"><h1>m7mlx-serve</h1>'
    about = 'What is served of OpenAI’s API; for programs: <a href="openapi.json">openapi.json</a>.'
    body = f"<p>{about}</p>{''.join(parts)}<h2>Schemas</h2><pre>{schemas}</pre>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{title}{body}</html>'


def _error(reason: str) -> dict[str, Any]:
    shape = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    return {"description": reason, "content": {"application/json": {"schema": shape}}}


def _plain(summary: str, kind: str) -> dict[str, Any]:
    return {"description": summary, "content": {kind: {}}}
