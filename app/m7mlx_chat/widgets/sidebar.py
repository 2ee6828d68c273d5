"""The conversations: all of them, or what a search finds in them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import date, timedelta

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.timer import Timer
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from m7mlx.terminal import visible
from m7mlx_chat.actions import bindings
from m7mlx_chat.store import Store
from m7mlx_chat.store.rows import Conversation, Hit

_PAUSE = 0.15  # seconds after the last key before a search starts
_LISTED, _FOUND = 500, 100


class Conversations(OptionList):
    """The list; its keys work on the one that is highlighted."""

    BINDINGS = bindings("sidebar")

    @property
    def chosen(self) -> int | None:
        """The conversation that is highlighted."""
        if self.highlighted is None:
            return None
        kind, _, number = (self.get_option_at_index(self.highlighted).id or "").partition("-")
        return int(number) if kind == "conversation" else None


class Sidebar(Vertical):
    """A field to search in, and the list."""

    DEFAULT_CSS = """
    Sidebar { width: 34%; min-width: 24; max-width: 34; height: 1fr; background: $panel; display: none; }
    Sidebar.-shown { display: block; }
    Sidebar Input { margin: 0; border: round $primary 40%; background: $panel; height: 3; }
    Sidebar Input:focus { border: round $primary; }
    Sidebar Conversations { height: 1fr; background: $panel; border: none; padding: 0 1; scrollbar-size-vertical: 1; }
    Sidebar Conversations:focus { border: none; }
    Sidebar Conversations > .option-list--option-disabled { color: $text-muted; }
    Sidebar .hint { height: 1; padding: 0 1; color: $text-muted; }
    """

    class Chosen(Message):
        """The user opens a conversation."""

        def __init__(self, conversation: int) -> None:
            super().__init__()
            self.conversation = conversation

    class Found(Message):
        """The user jumps to a message."""

        def __init__(self, message: int) -> None:
            super().__init__()
            self.message = message

    def __init__(self, store: Store) -> None:
        super().__init__(id="sidebar")
        self._store = store
        self._archived = False
        self._shown: int | None = None
        self._pause: Timer | None = None

    def compose(self) -> ComposeResult:
        yield Input(placeholder="Search all conversations", id="search", compact=False)
        yield Conversations(markup=False)
        yield Static("", classes="hint", markup=False)

    @property
    def conversations(self) -> Conversations:
        return self.query_one(Conversations)

    @property
    def is_shown(self) -> bool:
        return self.has_class("-shown")

    def search(self, text: str = "") -> None:
        """Give the search field the focus."""
        field = self.query_one(Input)
        if text:
            field.value = text
        field.focus()

    def toggle_archived(self) -> None:
        self._archived = not self._archived
        self.refresh_list()

    def refresh_list(self, shown: int | None = None) -> None:
        """Read the list, or the search, anew; `shown` is the conversation on the screen."""
        self._shown = shown if shown is not None else self._shown
        if not self.is_shown:
            return
        text = self.query_one(Input).value
        if text.strip():
            self._list_hits(self._store.search(text, _FOUND))
        else:
            self._list_all(self._store.conversations(self._archived, _LISTED))

    # --- listing ----------------------------------------------------------------------------------

    def _list_all(self, conversations: list[Conversation]) -> None:
        options = list(_grouped(conversations))
        self._fill(options)
        here = f"conversation-{self._shown}"
        if any(option.id == here for option in options):
            self.conversations.highlighted = self.conversations.get_option_index(here)
        what = "put away" if self._archived else "conversation" if len(conversations) == 1 else "conversations"
        self._hint(f"{len(conversations) or 'no'} {what} · F1: keys")

    def _list_hits(self, hits: list[Hit]) -> None:
        self._fill([Option(_hit(hit), id=f"message-{hit.message}") for hit in hits])
        self.conversations.highlighted = 0 if hits else None
        more = "+" if len(hits) == _FOUND else ""
        self._hint(f"{len(hits)}{more} messages found" if hits else "nothing found")

    def _fill(self, options: list[Option]) -> None:
        scroll, highlighted = self.conversations.scroll_y, self.conversations.highlighted
        self.conversations.clear_options()
        self.conversations.add_options(options)
        if highlighted is not None and highlighted < len(options) and not options[highlighted].disabled:
            self.conversations.highlighted = highlighted
            self.conversations.scroll_to(y=scroll, animate=False)

    def _hint(self, text: str) -> None:
        self.query_one(".hint", Static).update(text)

    # --- what the user does -----------------------------------------------------------------------

    @on(Input.Changed)
    def _typed(self) -> None:
        if self._pause is not None:
            self._pause.stop()
        self._pause = self.set_timer(_PAUSE, self.refresh_list)

    @on(Input.Submitted)
    def _submitted(self) -> None:
        self.refresh_list()
        if self.conversations.option_count:
            self.conversations.focus()
            if self.conversations.highlighted is None:
                self.conversations.action_first()

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        kind, _, number = (event.option_id or "").partition("-")
        self.post_message(self.Chosen(int(number)) if kind == "conversation" else self.Found(int(number)))


def _grouped(conversations: list[Conversation]) -> Iterator[Option]:
    """Options under headings: today, yesterday, …"""
    heading = ""
    for conversation in conversations:
        when = _when(conversation.updated)
        if when != heading:
            heading = when
            yield Option(Text(heading, style="bold"), disabled=True)
        yield Option(
            Text(visible(conversation.title), no_wrap=True, overflow="ellipsis"), id=f"conversation-{conversation.id}"
        )


def _when(seconds: float, today: date | None = None) -> str:
    day, today = date.fromtimestamp(seconds), today or date.fromtimestamp(time.time())
    for days, name in ((0, "Today"), (1, "Yesterday"), (7, "This week"), (31, "This month")):
        if day >= today - timedelta(days=days):
            return name
    return str(day.year)


def _hit(hit: Hit) -> Text:
    who = "you" if hit.role == "user" else "model"
    text = Text(visible(hit.title), style="bold", no_wrap=True, overflow="ellipsis")
    snippet = Text(f"{who}: {visible(hit.snippet)}", style="dim")
    for first, last in hit.marks:
        snippet.stylize("not dim bold reverse", first + len(who) + 2, last + len(who) + 2)
    return Text("\n").join([text, snippet])
