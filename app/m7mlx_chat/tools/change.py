"""What /tools does, on a screen and in lines."""

from __future__ import annotations

from m7mlx.errors import InputError
from m7mlx_chat.events import AnyTools

_NONE = "There are no tools: config.toml can name servers, [tools.NAME]"


def change_tools(tools: AnyTools, argument: str) -> str | None:
    """Turn tools on or off, or have one asked about again; says what was done.

    Returns None where they are to be listed. Raises InputError.
    """
    what, _, name = argument.strip().partition(" ")
    if not tools.overview():
        raise InputError(_NONE)
    if what in ("on", "off"):
        tools.is_on = what == "on"
        return "the model is told of tools" if tools.is_on else "tools are off, until /tools on or a restart"
    if what == "ask" and name:
        if not tools.forget(name.strip()):
            raise InputError(f"nothing is kept of a tool {name.strip()!r}")
        return f"{name.strip()} is asked about again"
    if what:
        raise InputError("/tools shows them; /tools off, /tools on, /tools ask NAME")
    return None
