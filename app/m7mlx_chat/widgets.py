"""What the chat is made of: messages, the welcome panel, the window gauge, the help screen."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text as RichText
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from m7mlx_chat.actions import ACTIONS
from m7mlx_chat.engine import Done
from m7mlx_chat.markdown import answer_markdown
from m7mlx_chat.terminal import visible


class UserMessage(Static):
    """What the user wrote, to the letter: no markup, no Markdown."""

    SHOWN = 20_000  # characters; a long paste is in the conversation whole, on the screen in part

    def __init__(self, text: str) -> None:
        shown = visible(text)
        if len(shown) > self.SHOWN:
            shown = shown[: self.SHOWN] + f"\n… ({len(shown) - self.SHOWN:,} more characters)"
        super().__init__(shown, markup=False)


class Answer(Vertical):
    """An answer: Markdown that grows, and a line below it with what it cost."""

    def __init__(self) -> None:
        super().__init__()
        self._markdown = answer_markdown()
        self._footer = Static("", classes="footer", markup=False)
        self._stream: MarkdownStream | None = None
        self.text = ""

    def compose(self) -> ComposeResult:
        yield self._markdown
        yield self._footer

    async def write(self, text: str) -> None:
        """Show more of the answer."""
        text = visible(text)
        self.text += text
        if self._stream is None:
            self._stream = Markdown.get_stream(self._markdown)
        await self._stream.write(text)

    async def finish(self, footer: str) -> None:
        """Render the whole text once more, in one piece, and show `footer`."""
        if self._stream is not None:
            await self._stream.stop()
            self._stream = None
        await self._markdown.update(self.text)
        self._footer.update(footer)


def footer_of(done: Done) -> str:
    """The line below an answer: how it ended and how fast it was."""
    parts = {"stop": [], "length": ["cut at the limit"], "stopped": ["stopped"]}[done.reason]
    parts += [f"{len(done.ids):,} tokens"]
    if done.ids:
        if done.tokens_per_second:
            parts.append(f"{done.tokens_per_second:.1f} tok/s")
        parts.append(f"first after {done.time_to_first_token:.2f} s")
    return " · ".join(parts)


class ErrorMessage(Static):
    """A failure, in the place where the answer would have been."""

    def __init__(self, text: str) -> None:
        super().__init__(f"✗ {visible(text)}", markup=False)


class Welcome(Static):
    """What the chat shows before the first message."""

    def __init__(self, model: str) -> None:
        table = Table.grid(padding=(0, 3))
        for key, what in (
            ("Enter", "send"),
            ("Ctrl+J", "new line"),
            ("Esc", "stop the answer"),
            ("Ctrl+N", "new conversation"),
            ("F1", "all keys"),
        ):
            table.add_row(RichText(key, style="bold"), RichText(what, style="dim"))
        title = RichText.assemble(("m7mlx", "bold"), (" · private, local, exact", "dim"))
        whole = Table.grid(padding=(0, 0))
        whole.add_row(title)
        whole.add_row(RichText(model, style="dim"))
        whole.add_row("")
        whole.add_row(table)
        super().__init__(whole)


def gauge(seen: int, window: int | None, context: int, cache_bytes: int, width: int = 12) -> RichText:
    """How much of what it can see the model has seen: full means the rolling buffer turns, in the same memory."""
    limit = window or context
    filled = min(width, round(width * seen / limit))
    word = "window" if window else "context"
    line = RichText()
    line.append(f"{word} ", style="dim")
    line.append("▰" * filled + "▱" * (width - filled))
    line.append(f" {min(seen, limit):,}/{limit:,}", style="dim")
    if window and seen > window:
        line.append(f" · {seen - window:,} beyond", style="dim")
    if cache_bytes:
        line.append(f" · {cache_bytes / 1e6:,.0f} MB", style="dim")
    return line


class Help(ModalScreen[None]):
    """All keys."""

    BINDINGS = [("escape,f1,q,enter", "dismiss", "Close")]  # noqa: RUF012 - Textual's own form

    def compose(self) -> ComposeResult:
        keys = RichText()
        for action in ACTIONS:
            keys.append(f"{action.shown:<20}", style="bold").append(f"{action.help}\n")
        with Vertical(id="help"):
            yield Static("Keys", classes="title")
            yield Static(keys)
            yield Static("Esc closes this", classes="footer")
