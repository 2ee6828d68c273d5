"""What the chat shows before the first message."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text
from textual.widgets import Static


class Welcome(Static):
    """What to do, in a few lines."""

    DEFAULT_CSS = """
    Welcome { width: auto; height: auto; margin: 1 2; padding: 1 3; border: round $primary 60%; }
    """

    def __init__(self) -> None:
        table = Table.grid(padding=(0, 3))
        for key, what in (
            ("Enter", "send"),
            ("Ctrl+J", "new line"),
            ("Esc", "stop the answer"),
            ("Ctrl+B", "conversations"),
            ("Ctrl+O", "models"),
            ("F3", "the rolling buffer, drawn"),
            ("F1", "all keys and commands"),
        ):
            table.add_row(Text(key, style="bold"), Text(what, style="dim"))
        whole = Table.grid()
        whole.add_row(Text.assemble(("m7mlx", "bold"), (" · private, local, exact", "dim")))
        whole.add_row("")
        whole.add_row(table)
        super().__init__(whole)
