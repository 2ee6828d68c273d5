"""Conversations to files, and files to conversations."""

from __future__ import annotations

import os
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx_chat.files import free_name, write_new
from m7mlx_chat.portable import read_file, to_json
from m7mlx_chat.portable.page import to_html, to_markdown
from m7mlx_chat.view import ChatView

_FORMATS = ("md", "html", "json")


class FileCommands(ChatView):
    """Export and import."""

    def action_export(self, argument: str = "") -> None:
        if self.session.conversation is None:
            raise InputError("there is nothing to export yet")
        first, _, rest = argument.partition(" ")
        kind, name = (first, rest.strip()) if first in _FORMATS else ("", argument)
        head = self.store.conversation(self.session.conversation)
        suffix = Path(name).suffix.removeprefix(".")
        kind = kind or (suffix if suffix in _FORMATS else "md")
        path = Path(os.path.expanduser(name)) if name else free_name(Path.cwd(), head.title, f".{kind}")
        if kind == "json":
            text = to_json(self.store.tree(head.id))
        else:
            branch = self.store.branch(self.session.line[-1]) if self.session.line else []
            text = (to_html if kind == "html" else to_markdown)(head, branch)
        write_new(path, text)
        self.tell(f"written to {path}")

    async def action_import(self, argument: str = "") -> None:
        if not argument:
            raise InputError("/import needs a file: ours (/export json), or ChatGPT's conversations.json")
        imported = read_file(Path(os.path.expanduser(argument)))
        planted = self.store.plant(imported.trees)
        self.tell(imported.told())
        await self.open_conversation(planted[-1])
