"""The conversations: all of them, or what a search finds in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Literal

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.events import DescendantBlur, DescendantFocus, Key
from textual.message import Message
from textual.timer import Timer
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option, OptionDoesNotExist

from m7mlx.terminal import visible
from m7mlx.units import counted
from m7mlx_chat.actions import bindings
from m7mlx_chat.dates import full_time, group_of, short_time
from m7mlx_chat.focus import give_focus
from m7mlx_chat.store import Store
from m7mlx_chat.store.rows import Conversation, Hit

_PAUSE = 0.15  # seconds after the last key before a search starts
_PAGE, _FOUND, _TITLES = 500, 100, 10  # conversations listed at a time, messages and titles found
_NEAR = 5  # rows from the end of the list where the next page is added


Shelf = Literal["current", "put away", "deleted"]


class Conversations(OptionList):
    """The list; its keys work on the one that is highlighted, while the list has the focus.

    A click does not give it that: a key that is typed after a click is meant for the composer.
    """

    BINDINGS = bindings("sidebar")
    FOCUS_ON_CLICK = False

    class NearEnd(Message):
        """The end of the list is coming into view."""

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if new_value > old_value and self.max_scroll_y - new_value <= _NEAR:
            self.post_message(self.NearEnd())

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
        self.shelf: Shelf = "current"  # which conversations are listed
        self._pages = 1
        self._searched = ""  # what the hits that are listed were searched for
        self._shown: int | None = None
        self._pause: Timer | None = None
        self._listed = ""  # how many there are, or were found

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
        give_focus(field)

    def toggle_shelf(self, shelf: Shelf) -> None:
        """List the conversations of a shelf, or the current ones again."""
        self.shelf, self._pages = "current" if self.shelf == shelf else shelf, 1
        self.refresh_list()

    def refresh_list(self, shown: int | None = None) -> None:
        """Read the list, or the search, anew; `shown` is the conversation on the screen."""
        self._shown = shown if shown is not None else self._shown
        if not self.is_shown:
            return
        text = self.query_one(Input).value
        is_new, self._searched = text != self._searched, text
        if text.strip():
            tags, rest = self._store.tags_in(text)
            is_tag = bool(tags) and not rest
            titled = self._store.titled(text, _PAGE if is_tag else _TITLES)
            heading = " ".join(f"#{tag}" for tag in tags) if is_tag else "Titles"
            self._list_hits(heading, titled, self._store.search(text, _FOUND), is_new)
        else:
            self._list_shelf()

    # --- listing ----------------------------------------------------------------------------------

    def _list_shelf(self, *, is_longer: bool = False) -> None:
        """List a shelf; `is_longer`: only a page has been added, and the user is at its end."""
        limit = self._pages * _PAGE
        pinned: list[Conversation] = []
        if self.shelf == "deleted":
            listed = self._store.deleted(limit)
            hint = f"{len(listed) or 'none'} deleted · Enter brings back"
        else:
            away = self.shelf == "put away"
            pinned = self._store.pinned(away)
            listed = self._store.conversations(away, limit)
            count = self._store.count(away)
            if away:
                what = f"{count:,} put away" if count else "none put away"
            else:
                what = counted(count, "conversation") if count else "no conversations"
            hint = f"{what} · F1: keys"
        self._fill(list(_grouped(pinned, listed)))
        self._hint(hint)
        here = f"conversation-{self._shown}"
        with suppress(OptionDoesNotExist):
            if not is_longer:
                self.conversations.highlighted = self.conversations.get_option_index(here)

    def _list_hits(self, heading: str, titled: list[Conversation], hits: list[Hit], is_new: bool) -> None:
        options: list[Option | None] = []
        if titled:
            options += [_heading(visible(heading)), *map(_titled, titled)]
        if titled and hits:
            options.append(_heading("Messages"))
        for hit in hits:
            options += [Option(_hit(hit), id=f"message-{hit.message}"), None]  # a line between two
        self._fill(options[:-1] if hits else options)
        if is_new or self.conversations.highlighted is None:
            self.conversations.highlighted = (1 if titled else 0) if options else None
        found = [counted(len(titled), "title" if heading == "Titles" else "conversation")] if titled else []
        found += [f"{_FOUND}+ messages" if len(hits) == _FOUND else counted(len(hits), "message")] if hits else []
        self._hint(f"{', '.join(found)} found" if found else "nothing found")

    def _fill(self, listed: Sequence[Option | None]) -> None:
        scroll, highlighted = self.conversations.scroll_y, self.conversations.highlighted
        self.conversations.clear_options()
        self.conversations.add_options(listed)
        options = [option for option in listed if option is not None]
        if highlighted is not None and highlighted < len(options) and not options[highlighted].disabled:
            self.conversations.highlighted = highlighted
            self.conversations.scroll_to(y=scroll, animate=False)

    def _hint(self, text: str) -> None:
        self._listed = text
        self._show_hint()

    @on(DescendantFocus)
    @on(DescendantBlur)
    @on(OptionList.OptionHighlighted)
    def _show_hint(self) -> None:
        """Tell of the conversation that is chosen in the list, or how many there are."""
        chosen, text = self.conversations.chosen, self._listed
        if self.conversations.has_focus and chosen is not None and self.shelf != "deleted":
            head = self._store.conversation(chosen)
            text = f"{counted(head.messages, 'message')} · {full_time(head.updated)}"
        self.query_one(".hint", Static).update(text)

    # --- what the user does -----------------------------------------------------------------------

    @on(Input.Changed)
    def _typed(self) -> None:
        if self._pause is not None:
            self._pause.stop()
        self._pause = self.set_timer(_PAUSE, self.refresh_list)

    @on(Input.Submitted)
    def _submitted(self) -> None:
        """Open what is highlighted; without a search, go to the list."""
        if self.query_one(Input).value != self._searched:  # not searched for yet
            self.refresh_list()
        if not self.conversations.option_count:
            return
        if self.conversations.highlighted is None:
            self.conversations.action_first()
        if self.query_one(Input).value.strip():
            self.conversations.action_select()
        else:
            give_focus(self.conversations)

    def on_key(self, event: Key) -> None:
        """Move in the list while something is typed to search for."""
        if self.query_one(Input).has_focus and event.key in ("up", "down"):
            event.stop()
            if event.key == "up":
                self.conversations.action_cursor_up()
            else:
                self.conversations.action_cursor_down()

    @on(Conversations.NearEnd)
    def _add_page(self) -> None:
        if not self.query_one(Input).value.strip() and self.conversations.option_count >= self._pages * _PAGE:
            self._pages += 1
            self._list_shelf(is_longer=True)

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        kind, _, number = (event.option_id or "").partition("-")
        self.post_message(self.Chosen(int(number)) if kind == "conversation" else self.Found(int(number)))


def _grouped(pinned: list[Conversation], conversations: list[Conversation]) -> Iterator[Option]:
    """Options under headings: pinned, today, yesterday, …"""
    if pinned:
        yield _heading("Pinned")
    yield from map(_titled, pinned)
    heading, first = "", {conversation.id for conversation in pinned}
    for conversation in conversations:
        if conversation.id in first:
            continue
        when = group_of(conversation.deleted_at or conversation.updated)
        if when != heading:
            heading = when
            yield _heading(heading)
        yield _titled(conversation)


def _heading(text: str) -> Option:
    return Option(Text(text, style="bold"), disabled=True)


def _titled(conversation: Conversation) -> Option:
    title = Text("★ " * conversation.pinned + visible(conversation.title), no_wrap=True, overflow="ellipsis")
    if conversation.tags:
        title.append(f"\n{visible(conversation.hashtags)}", style="dim")
    return Option(title, id=f"conversation-{conversation.id}")


def _hit(hit: Hit) -> Text:
    who = "you" if hit.role == "user" else "model"
    when = short_time(hit.created)
    who += f", {when}" if when else ""
    text = Text(visible(hit.title), style="bold", no_wrap=True, overflow="ellipsis")
    snippet = Text(f"{who}: {visible(hit.snippet)}", style="dim")
    for first, last in hit.marks:
        snippet.stylize("not dim bold reverse", first + len(who) + 2, last + len(who) + 2)
    return Text("\n").join([text, snippet])
