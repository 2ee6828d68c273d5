"""Looking: help, figures, the rolling buffer; selecting and scrolling."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text
from textual import on
from textual.screen import ModalScreen
from textual.widgets import Markdown

from m7mlx.terminal import visible
from m7mlx.units import counted
from m7mlx_chat.figures import HEADINGS, figures
from m7mlx_chat.focus import give_focus
from m7mlx_chat.markdown import CodeBlock
from m7mlx_chat.screens.dialogs import Figures, Help
from m7mlx_chat.view import ChatView
from m7mlx_chat.widgets.ring import RingPicture, copies_line

_LISTED = 200  # answers, of which figures are shown


class LookCommands(ChatView):
    """What shows more, and changes nothing."""

    def action_help(self) -> None:
        if isinstance(self.screen, ModalScreen):
            self.pop_screen()
        else:
            self.push_screen(Help(self.config.keys))

    def action_stats(self) -> None:
        """Show the figures of every answer of the branch, the newest first."""
        answers = [message for message in self.session.branch if message.role == "assistant"]
        table = Table.grid(padding=(0, 2))
        table.add_row(*(Text(heading, style="bold", justify="right") for heading in ("", *HEADINGS)))
        for message in reversed(answers[-_LISTED:]):
            what = Text(" ".join(visible(message.text).split())[:24], style="dim", no_wrap=True)
            table.add_row(what, *(Text(number, justify="right") for number in figures(message)))
        title = f"What {counted(len(answers), 'answer')} cost" if answers else "Nothing has been answered yet"
        if self.session.on_disk is not None:
            title += f"\n{copies_line(self.session.on_disk)}"
        self.push_screen(Figures(title, table))

    def action_window(self) -> None:
        self.query_one(RingPicture).toggle_class("-shown")
        self.call_after_refresh(self.show_gauge)

    def action_select(self, direction: int) -> None:
        """Select the next message (1) or the one before (-1); the composer follows the last."""
        views = self.transcript.views
        at = views.index(self.selected) if self.selected in views else len(views)
        if 0 <= at + direction < len(views):
            views[at + direction].select()
        elif direction > 0:
            give_focus(self.composer)

    def action_thoughts(self) -> None:
        """Show what is folded of the selected message, or fold it again."""
        if self.selected is not None:
            self.selected.toggle_fold()

    def action_wrap_code(self) -> None:
        """Wrap the long lines of code of the selected message, or scroll them again."""
        if self.selected is not None:
            blocks = list(self.selected.query(CodeBlock))
            wraps = not any(block.has_class("-wrapped") for block in blocks)
            for block in blocks:
                block.set_class(wraps, "-wrapped")

    async def action_scroll(self, direction: int) -> None:
        """Scroll the conversation by a page, down (1) or up (-1)."""
        await self.transcript.page(direction)

    async def action_go_to_end(self, direction: int) -> None:
        """Go to the end of the conversation (1) or to its beginning (-1)."""
        await self.transcript.go_to_end(direction)

    @on(Markdown.LinkClicked)
    def _show_link(self, event: Markdown.LinkClicked) -> None:
        """Show where a link leads; opening it is left to the user."""
        event.prevent_default()
        self.notify(visible(event.href), title="This link leads to", timeout=8, markup=False)
