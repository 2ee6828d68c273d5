"""Conversations to files, and files to conversations."""

from __future__ import annotations

import os
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx_chat.exporting import export
from m7mlx_chat.portable import read_file
from m7mlx_chat.view import ChatView


class FileCommands(ChatView):
    """Export and import."""

    def action_export(self, argument: str = "") -> None:
        self.tell(f"written to {export(self.session, argument)}")

    async def action_import(self, argument: str = "") -> None:
        if not argument:
            raise InputError("/import needs a file: ours (/export json), or ChatGPT's conversations.json")
        imported = read_file(Path(os.path.expanduser(argument)))
        planted = self.store.plant(imported.trees)
        self.tell(imported.told())
        await self.open_conversation(planted[-1])
