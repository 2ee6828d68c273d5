"""The server's own pages: a chat over its API, and what its API understands."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from m7mlx_serve.catalog import Catalog
from m7mlx_serve.openapi import page

# The pages' own script and style, and nothing from anywhere else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


def page_routes(catalog: Catalog, with_key: bool) -> list[Route]:
    """The routes of all pages, of a server of these models; `with_key` if it asks for a key."""

    def show_docs(request: Request) -> Response:  # on a thread: making it takes a while
        return HTMLResponse(page(tuple(catalog.names), with_key), headers=_HEADERS)

    return [Route("/docs", show_docs), *(Route(path, _show_file) for path in _FILES)]


async def _show_file(request: Request) -> Response:
    name, kind = _FILES[request.scope["path"]]
    text = (files("m7mlx_serve") / name).read_text(encoding="utf-8")
    return HTMLResponse(text, media_type=kind, headers=_HEADERS)
