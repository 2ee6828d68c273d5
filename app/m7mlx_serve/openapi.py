"""What this server understands: the OpenAPI document, and a page for people."""

from __future__ import annotations

import html
import json
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from m7mlx_serve.endpoint import Endpoint
from m7mlx_serve.endpoints import ENDPOINTS
from m7mlx_serve.ollama import replies as ollama
from m7mlx_serve.openai import replies
from m7mlx_serve.responses import replies as response_replies
from m7mlx_serve.strict import Strict

_Model = type[BaseModel]
_GETS: dict[str, tuple[_Model | None, str]] = {
    "/v1/responses/{id}": (response_replies.ResponseReply, "A response that is held"),
    "/v1/models": (replies.ModelList, "The models that are served, loaded or not"),
    "/v1/models/{name}": (replies.ModelCard, "A model by its name"),
    "/api/tags": (ollama.TagList, "The models that are served, by Ollama's API"),
    "/api/ps": (ollama.RunningList, "Those that are loaded, by Ollama's API"),
    "/api/version": (ollama.OllamaVersion, "The version of Ollama whose API this is"),
    "/health": (replies.Health, "Whether requests can be answered"),
    "/metrics": (None, "Figures for Prometheus"),
}
PATHS = (*ENDPOINTS, *_GETS)
_EVENTS = "With `stream`: an event for each chunk, then `[DONE]`; after a failure the last event is an error."
_EVERYWHERE = {
    "400": "The request cannot be met; the message says what is wrong with it",
    "401": "A key is needed",
    "403": "Another Host or Origin than this server's",
    "431": "Too many headers, or too large ones",
    "500": "The request failed on the way",
    "503": "The server is shutting down, the model cannot be loaded, or too many connections are open",
}
_ANSWERING = {
    "404": "The model is not served here",
    "408": "The body did not come in time",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "429": "Too many requests are waiting; Retry-After says when to come back",
    "504": "The answer took too long",
}


@lru_cache(maxsize=4)
def document(models: tuple[str, ...], with_key: bool) -> dict[str, Any]:
    """The OpenAPI document of a server of `models`; `with_key` if requests must carry a key."""
    bodies = [(endpoint.body, "validation") for endpoint in ENDPOINTS.values()]
    answers = [shape for endpoint in ENDPOINTS.values() for shape in (endpoint.reply, endpoint.chunk)]
    answers += [shape for shape, _ in _GETS.values() if shape] + [response_replies.DroppedResponse]
    errors = {endpoint.error_reply for endpoint in ENDPOINTS.values()}
    answers += [replies.ErrorReply, *sorted(errors - {replies.ErrorReply}, key=lambda shape: shape.__name__)]
    pairs = [*bodies, *((shape, "serialization") for shape in dict.fromkeys(answers))]
    _, schemas = models_json_schema(pairs, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for path, endpoint in ENDPOINTS.items():
        _complete(schemas["$defs"][endpoint.body.__name__], endpoint.body, models)
        answer = _answer(endpoint.reply, f"The answers. {_EVENTS}")
        if path.startswith("/api/"):
            answer["content"]["application/x-ndjson"] = {"schema": {"type": "string"}}
        else:
            answer["content"]["text/event-stream"] = {"schema": _event(endpoint)}
        request = {"required": True, "content": {"application/json": {"schema": _ref(endpoint.body)}}}
        responses = {"200": answer} | _errors(_EVERYWHERE | _ANSWERING, endpoint.error_reply)
        paths[path] = {"post": {"summary": endpoint.summary, "requestBody": request, "responses": responses}}
    for path, (found, summary) in _GETS.items():
        responses = {"200": _answer(found, summary)} | _errors(_EVERYWHERE)
        operation: dict[str, Any] = {"summary": summary, "responses": responses}
        if "{name}" in path:
            operation |= _parameter("name", {"type": "string", "enum": list(models)})
            operation["responses"] |= _errors({"404": _ANSWERING["404"]})
        if "{id}" in path:
            operation |= _parameter("id", {"type": "string", "pattern": "^resp_[0-9a-f]{32}$"})
            operation["responses"] |= _errors({"404": "No such response is held, or not any longer"})
        if found is replies.Health:
            operation["responses"]["503"] = _answer(found, "It ends; or an error, as everywhere")
            either = [_ref(found), _ref(replies.ErrorReply)]
            operation["responses"]["503"]["content"]["application/json"]["schema"] = {"anyOf": either}
            operation["security"] = []
        paths[path] = {"get": operation}
        if "{id}" in path:
            dropped = {"200": _answer(response_replies.DroppedResponse, "It is held no longer")}
            told = {"summary": "Hold a response no longer", "responses": operation["responses"] | dropped}
            paths[path]["delete"] = operation | told
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "m7mlx-serve", "version": version("m7mlx")},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }
    if with_key:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described


def page(models: tuple[str, ...], with_key: bool) -> str:
    """The document as a page to read, without a script."""
    parts = []
    data = document(models, with_key)
    for path, methods in data["paths"].items():
        for method, what in methods.items():
            parts.append(f"<h2><code>{method.upper()} {path}</code></h2><p>{html.escape(what['summary'])}.</p>")
            rows = "".join(
                f"<tr><td>{status}<td>{html.escape(one['description'])}" for status, one in what["responses"].items()
            )
            parts.append(f"<table>{rows}</table>")
    for name, schema in data["components"]["schemas"].items():
        told = html.escape(json.dumps(schema, indent=2, ensure_ascii=False))
        parts.append(f"<details><summary><code>{name}</code></summary><pre>{told}</pre></details>")
    links = '<link rel="icon" href="data:,"><link rel="stylesheet" href="page.css">'
    about = "What is served of OpenAI’s API, of Anthropic’s and of Ollama’s; for programs:"
    about += ' <a href="openapi.json">openapi.json</a>.'
    body = f'<body class="docs"><h1>m7mlx-serve</h1><p>{about}</p>{"".join(parts)}</body>'
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html><html lang="en">{head}<title>m7mlx-serve: API</title>{links}{body}</html>'


def _complete(schema: dict[str, Any], body: type[Strict], models: tuple[str, ...]) -> None:
    """Add what `Strict` accepts before it checks fields: null, and fields that mean nothing."""
    properties = schema["properties"]
    for name, value in properties.items():
        if name not in schema.get("required", ()) and {"type": "null"} not in value.get("anyOf", ()):
            properties[name] = {"anyOf": [value, {"type": "null"}]}
    properties["model"] = {"enum": [*models, "", None], "description": "May be left out"}
    properties |= {name: {"description": "Accepted; it has no meaning here"} for name in sorted(body.ignored)}
    properties |= {name: {"enum": [*values, None]} for name, values in body.neutral.items()}


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A part of a path."""
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": schema}]}


def _ref(model: _Model) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _event(endpoint: Endpoint) -> dict[str, Any]:
    """One event of a stream."""
    said = {"anyOf": [_ref(endpoint.chunk), _ref(endpoint.error_reply)]}
    chunked = {"contentMediaType": "application/json", "contentSchema": said}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, chunked]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _answer(model: _Model | None, about: str) -> dict[str, Any]:
    """A response of JSON in the shape `model`; of text without one."""
    content = (
        {"application/json": {"schema": _ref(model)}} if model else {"text/plain": {"schema": {"type": "string"}}}
    )
    return {"description": about, "content": content}


def _errors(reasons: dict[str, str], shape: _Model = replies.ErrorReply) -> dict[str, Any]:
    return {status: _answer(shape, reason) for status, reason in reasons.items()}
