"""POST /api/show: what the model is."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.endpoint import Body, Endpoint, Prompts, Wanted
from m7mlx_serve.ollama.fields import error_body
from m7mlx_serve.ollama.replies import OllamaError, Shown


class ShowRequest(Body):
    """The body of POST /api/show."""

    stream: Literal[False] = False
    ignored = frozenset({"verbose", "system", "template", "options"})

    @model_validator(mode="before")
    @classmethod
    def _has_an_old_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and "name" in data and "model" not in data:
            return {**{key: value for key, value in data.items() if key != "name"}, "model": data["name"]}
        return data

    def prompts(self, tokenizer: Tokenizer) -> Prompts:
        """Nothing is read."""
        return Prompts([])

    def wanted(self) -> Wanted:
        """Nothing is answered."""
        return Wanted()

    def without_texts(self) -> Self:
        """There are none."""
        return self


ENDPOINT = Endpoint(
    "/api/show", "What the model is, by Ollama's API", ShowRequest, Shown, Shown, error_body, OllamaError
)
