"""A server's tools as a model is told of them: bounded, and each with a name of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m7mlx.errors import InputError
from m7mlx.grammar import schema_text
from m7mlx.tokens.messages import MAX_DEPTH, nests_deeper
from m7mlx_chat.servers import Server
from m7mlx_chat.tools.approvals import key_of

_MOST_TEXT = 4_000  # characters of a description that the model is told
_MOST_SCHEMA = 20_000  # characters of a schema
_MOST_NAME = 64
_OTHER = re.compile("[^A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Offer:
    """A tool that a server has.

    name  as the server calls it
    key   names the tool as it is (`approvals.key_of`)
    """

    server: Server
    name: str
    description: str
    parameters: Mapping[str, Any]
    key: str

    @property
    def function(self) -> dict[str, Any]:
        """The tool for the model, but for the name that it has there."""
        return {"description": self.description[:_MOST_TEXT], "parameters": dict(self.parameters)}


def offer_of(server: Server, name: str, description: str, parameters: Mapping[str, Any]) -> Offer:
    """A tool, if a model can be told of it. Raises InputError."""
    if not _OTHER.sub("", name):
        raise InputError("its name has no letter")
    if nests_deeper(parameters, MAX_DEPTH) or len(schema_text(parameters)) > _MOST_SCHEMA:
        raise InputError("its schema is too large")
    if parameters.get("type") != "object":
        raise InputError("its schema is no object's")
    return Offer(server, name, description, parameters, key_of(server, name, description, parameters))


def named(offers: Sequence[Offer]) -> dict[str, Offer]:
    """The tools by the names that the model knows.

    Where two servers have a tool of the same name, both get the server's name before it: neither
    can stand in for the other.
    """
    short = [_OTHER.sub("_", offer.name)[:_MOST_NAME] for offer in offers]
    often = Counter(short)
    found: dict[str, Offer] = {}
    for name, offer in zip(short, offers, strict=True):
        own = name if often[name] == 1 else f"{offer.server.name}_{name}"[:_MOST_NAME]
        found.setdefault(own, offer)
    return found
