"""The conversation on the screen: the messages around the place that is looked at."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from m7mlx.units import counted
from m7mlx_chat.session import Session
from m7mlx_chat.widgets.messages import Answer, MessageView, view_of

PAGE, MOST = 20, 100  # messages: mounted at a time, mounted at once
_NEAR = 4  # rows from an end where the next page is fetched


class Transcript(VerticalScroll, can_focus=False):
    """The branch shown, `line[first:last]` of it as widgets.

    The end is kept in view until the user scrolls away.
    """

    DEFAULT_CSS = """
    Transcript > .-unseen { opacity: 70%; }
    Transcript > #horizon { height: auto; margin: 0 0 1 0; color: $text-muted; display: none; }
    Transcript { height: 1fr; padding: 1 2; scrollbar-size-vertical: 1; scrollbar-background: $background; }
    """

    def __init__(self, session: Session, welcome: Widget) -> None:
        super().__init__(id="chat")
        self._session = session
        self._welcome = welcome
        self._line: list[int] = []
        self._first = self._last = 0
        self._seen_from = 0  # the index of the first message of which the model sees anything
        self._horizon = Static("", id="horizon", markup=False)
        self._paging = False

    def compose(self) -> ComposeResult:
        yield self._welcome
        yield self._horizon

    def on_mount(self) -> None:
        self.anchor()

    @property
    def views(self) -> list[MessageView]:
        """The messages on the screen, in order."""
        return [child for child in self.children if isinstance(child, MessageView)]

    def view(self, message: int) -> MessageView | None:
        """The widget of a message, if it is on the screen."""
        return next((view for view in self.views if view.message.id == message), None)

    def answer(self, message: int) -> Answer | None:
        """The widget of an answer, if it is on the screen."""
        view = self.view(message)
        return view if isinstance(view, Answer) else None

    async def sync(self, *, at: int | None = None, select: bool = False) -> None:
        """Show the session's line: widgets that are still right stay.

        at      bring this message into view, and mark it
        select  select it: what is typed next is a command to it
        """
        line = self._session.line
        self._welcome.display = not line
        same = _shared_start(self._line, line)
        place = line.index(at) if at is not None and at in line else None
        out_of_sight = place is not None and not self._first <= place < min(self._last, same)
        with self.app.batch_update():
            if same <= self._first or out_of_sight or self._last < min(len(self._line), same):
                await self._show_around(line, len(line) if place is None else place)
            else:
                for old in self.views[same - self._first :]:
                    await old.remove()
                self._line, self._last = list(line), min(self._last, same)
                if len(line) - self._last > PAGE:
                    await self._show_around(line, len(line))
                else:
                    await self._mount(self._last, len(line))
                    self._last = len(line)
                    if at is None and self._last - self._first > 2 * PAGE:
                        await self._shorten()
                    self._dim()
        if self._session.under_way is not None and (live := self.answer(self._session.under_way.answer)) is not None:
            live.go_on()
        if at is not None and (view := self.view(at)) is not None:
            self._go_to(view, select)
        else:
            self.anchor()

    # --- what the model sees ----------------------------------------------------------------------

    def show_seen(self, first: int, sinks: int = 0) -> None:
        """Dim what the model no longer sees: all before the index `first`, but for some sinks."""
        self._seen_from = first
        kept = f", but for its first {counted(sinks, 'token')}" if sinks else ""
        self._horizon.update(f"▲ above: no longer seen by the model{kept}")
        self._dim()

    def _dim(self) -> None:
        views = self.views
        for index, view in enumerate(views, self._first):
            view.set_class(index < self._seen_from, "-unseen")
        place = self._seen_from - self._first
        self._horizon.display = self._seen_from > 0 and 0 <= place < len(views)
        if self._horizon.display and self.children.index(views[place]) != self.children.index(self._horizon) + 1:
            self.move_child(self._horizon, before=views[place])

    async def _show_around(self, line: Sequence[int], place: int) -> None:
        """Start over with the page around an index."""
        for view in self.views:
            await view.remove()
        self._line = list(line)
        self._last = min(len(line), place + PAGE // 2)
        self._first = max(0, self._last - PAGE)
        await self._mount(self._first, self._last)
        self._dim()

    async def _shorten(self) -> None:
        """Leave the last page: the end is looked at, and to lay out the others takes time."""
        for view in self.views[:-PAGE]:
            await view.remove()
        self._first = self._last - PAGE

    async def _mount(self, first: int, last: int, before: MessageView | None = None) -> None:
        under_way = self._session.under_way
        live = under_way.answer if under_way else None
        messages = [
            self._session.message(message.id) if message.id == live else message
            for message in self._session.store.read(self._line[first:last])
        ]
        await self.mount_all([view_of(message, message.id == live) for message in messages], before=before)

    def _go_to(self, view: MessageView, select: bool) -> None:
        self.release_anchor()
        for other in self.views:
            other.set_class(not select and other is view, "-found")
        if select:
            view.select()
        self.call_after_refresh(self.scroll_to_widget, view, animate=False, top=True)

    def show_times(self) -> None:
        """Show when messages were said as it is told today."""
        for view in self.views:
            view.when.show(in_full=view.has_focus)

    # --- pages ------------------------------------------------------------------------------------

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if self._paging or not self.is_mounted or self.is_anchored:
            return
        if new_value < old_value and new_value <= _NEAR and self._first > 0:
            self._paging = True
            self.call_later(self._earlier)
        elif new_value > old_value and self.max_scroll_y - new_value <= _NEAR and self._last < len(self._line):
            self._paging = True
            self.call_later(self._later)

    async def go_to_end(self, direction: int) -> None:
        """Show the end of the line (1), and stay there; or its beginning (-1)."""
        if direction > 0:
            if self._last < len(self._line):
                await self._show_around(self._line, len(self._line))
            self.anchor()
            return
        self.release_anchor()
        if self._first > 0:
            await self._show_around(self._line, 0)
        self.call_after_refresh(self.scroll_home, animate=False)

    async def page(self, direction: int) -> None:
        """Scroll by a page, fetching messages at either end."""
        rows = direction * max(1, self.scrollable_content_region.height - 1)
        if direction < 0:
            self.release_anchor()
        if direction < 0 and self.scroll_y + rows <= _NEAR and self._first > 0:
            await self._earlier(rows)
        elif direction > 0 and self.scroll_y + rows >= self.max_scroll_y - _NEAR and self._last < len(self._line):
            await self._later(rows)
        else:
            self.scroll_relative(y=rows, animate=False)

    async def _earlier(self, rows: int = 0) -> None:
        """Mount the page above the first; what is looked at stays in place, or moves by `rows`."""
        self._paging = True
        views = self.views
        if self._first > 0 and views:
            place = self.scroll_y - views[0].virtual_region.y
            first = max(0, self._first - PAGE)
            await self._mount(first, self._first, before=views[0])
            self._first = first
            for view in self.views[MOST:]:
                await view.remove()
            self._last = min(self._last, self._first + MOST)
            self._keep_in_view(views[0], place + rows)
        else:
            self._paging = False

    async def _later(self, rows: int = 0) -> None:
        self._paging = True
        views = self.views
        if self._last < len(self._line) and views:
            place = self.scroll_y - views[-1].virtual_region.y
            last = min(len(self._line), self._last + PAGE)
            await self._mount(self._last, last)
            self._last = last
            for view in self.views[:-MOST]:
                await view.remove()
            self._first = max(self._first, self._last - MOST)
            self._keep_in_view(views[-1], place + rows)
        else:
            self._paging = False

    def _keep_in_view(self, view: MessageView, place: float) -> None:
        """Scroll to `place` rows below the top of a message, once all have their places."""
        self._dim()

        def scroll() -> None:
            if view.is_attached:
                self.scroll_to(y=view.virtual_region.y + place, animate=False, force=True)
            self._paging = False

        def laid_out() -> None:
            self.call_after_refresh(scroll)

        self.call_after_refresh(laid_out)  # the answers mount their own parts first


def _shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of their first messages two lines share."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
