"""Tools as clients of /v1/responses send them, and which of them may be called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag

from m7mlx_serve.responses.items import full_name
from m7mlx_serve.strict import Name, Strict, Text

_HOSTED = ("file_search", "code_interpreter", "image_generation", "mcp", "tool_search", "programmatic_tool_calling")


class FunctionTool(Strict):
    """A function that the model may call; the client runs it."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    ignored = frozenset({"strict", "defer_loading", "output_schema", "allowed_callers", "cache_control"})

    def told(self, namespace: str = "") -> dict[str, Any]:
        """The function as the model is told of it."""
        name = full_name(namespace, self.name)
        return {"name": name, "description": self.description, "parameters": self.parameters}


class Namespace(Strict):
    """Functions with a name in common, as those of one MCP server that the client asks."""

    type: Literal["namespace"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    tools: Annotated[list[FunctionTool], Field(max_length=512, fail_fast=True)] = Field(default_factory=list)
    ignored = frozenset({"description"})


class TextFormat(Strict):
    """What the text for a tool may be. A grammar is told to the model and not enforced."""

    type: Literal["text", "grammar"]
    syntax: Name = ""
    definition: Text = ""


class CustomTool(Strict):
    """A tool that takes a text. The model is told of a function with one argument."""

    type: Literal["custom"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text = ""
    format: TextFormat = Field(default_factory=lambda: TextFormat(type="text"))
    ignored = frozenset({"defer_loading", "allowed_callers"})

    def told(self) -> dict[str, Any]:
        """The tool as the model is told of it."""
        about = self.description
        if self.format.definition:
            about = f"{about}\n\nThe input follows this grammar ({self.format.syntax}):\n{self.format.definition}"
        properties = {"input": {"type": "string"}}
        schema = {"type": "object", "properties": properties, "required": ["input"], "additionalProperties": False}
        return {"name": self.name, "description": about.strip(), "parameters": schema}


def _tag(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", "")
    return {"custom": "Custom", "namespace": "Namespace"}.get(str(kind), "Function")


Tool = Annotated[
    Annotated[FunctionTool, Tag("Function")]
    | Annotated[CustomTool, Tag("Custom")]
    | Annotated[Namespace, Tag("Namespace")],
    Discriminator(_tag),
]


def told_tools(tools: Sequence[FunctionTool | CustomTool | Namespace]) -> list[dict[str, Any]]:
    """All functions as the model is told of them."""
    told = []
    for tool in tools:
        told += [one.told(tool.name) for one in tool.tools] if isinstance(tool, Namespace) else [tool.told()]
    return told


class Called(NamedTuple):
    """How a client knows what a model calls."""

    namespace: str
    name: str
    is_custom: bool


def called_names(tools: Sequence[FunctionTool | CustomTool | Namespace]) -> dict[str, Called]:
    """How clients know what models call, by the names that models know, where that differs."""
    found = {}
    for tool in tools:
        if isinstance(tool, CustomTool):
            found[tool.name] = Called("", tool.name, is_custom=True)
        elif isinstance(tool, Namespace):
            for one in tool.tools:
                found[full_name(tool.name, one.name)] = Called(tool.name, one.name, is_custom=False)
    return found


def names_only(tools: Sequence[FunctionTool | CustomTool | Namespace]) -> list[CustomTool | Namespace]:
    """The tools for `called_names`, without descriptions and schemas."""
    kept: list[CustomTool | Namespace] = []
    for tool in tools:
        if isinstance(tool, CustomTool):
            kept.append(CustomTool(type="custom", name=tool.name))
        elif isinstance(tool, Namespace):
            inner = [FunctionTool(type="function", name=one.name) for one in tool.tools]
            kept.append(Namespace(type="namespace", name=tool.name, tools=inner))
    return kept


def without_hosted(tools: Any) -> Any:
    """The tools that a client can run, of those that it sends.

    What OpenAI's own servers would run is left out: a model that is not told of it does not call
    it, as it need not. Raises ValueError for what a client would run in a form that only OpenAI's
    models know.
    """
    if not isinstance(tools, list):
        return tools
    kept = []
    for tool in tools:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind not in ("function", "custom", "namespace"):
            if kind in _HOSTED or kind.startswith("web_search"):
                continue
            raise ValueError(
                f"this model cannot be told of a tool of type {kind[:50]!r}; give it as a function, or leave it out"
            )
        kept.append(tool)
    return kept


class NamedTool(Strict):
    """A tool that must be called, by its name."""

    type: Literal["function", "custom"]
    name: Name


class AllowedTools(Strict):
    """Those of the tools that may, or must, be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=512, fail_fast=True)]


Choice = Literal["none", "auto", "required"] | NamedTool | AllowedTools
