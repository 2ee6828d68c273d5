"""For a user who looks elsewhere while the model answers: the terminal's title, and its bell.

In a browser the title is the page's; a page has no bell.
"""

from __future__ import annotations

import time

from m7mlx.terminal import one_line
from m7mlx_chat.under_way import UnderWay
from m7mlx_chat.view import ChatView, Parts

_LONG_SECONDS = 60.0  # an answer that took longer rings in any case: not every terminal tells its focus
_LONGEST = 80  # characters of a conversation's title; tabs show less
_ANSWERING, _ASKING, _ENDED = "● ", "? ", "✓ "


class BackgroundCommands(ChatView):
    """What the terminal tells while the chat is not looked at.

    Its title is the conversation's, with a mark before it: an answer is under way, a call waits for
    the user's word, or an answer has ended that has not been looked at.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._terminal_title = ""  # what the terminal shows
        self._began = 0.0  # when the answers under way began; 0: there is none
        self._was_asking = False  # a call waited for the user's word when this was looked at last
        self._is_unseen = False  # an answer has ended while nobody looked

    def show_title(self) -> None:
        super().show_title()
        self._show_in_terminal()

    def show_state(self, text: str = "") -> None:
        super().show_state(text)
        self._show_in_terminal()

    def watch_app_focus(self, has_focus: bool) -> None:
        """Take note that the user has come back, or has gone."""
        self._is_unseen = self._is_unseen and not has_focus
        self._show_in_terminal()

    def _show_in_terminal(self) -> None:
        under_way = self.session.under_way
        is_asking = under_way is not None and under_way.asking is not None
        if under_way is not None:
            self._began = self._began or time.monotonic()
        if is_asking and not self._was_asking:
            self._ring()
        self._was_asking = is_asking
        mark = _ASKING if is_asking else _ANSWERING if under_way is not None else _ENDED if self._is_unseen else ""
        # The title can be a stranger's text: nothing in it is for the terminal to obey.
        begun = self.title != self.TITLE
        title = mark + one_line(f"{self.title[:_LONGEST]} · {self.TITLE}" if begun else self.TITLE)
        if self.config.terminal_title and title != self._terminal_title:
            self._terminal_title = title
            self.send_title(title)

    def announce_end(self, under_way: UnderWay) -> None:
        """Ring if nobody was looking when the last of what was asked had been answered."""
        began, self._began = self._began, 0.0
        took = time.monotonic() - began if began else 0.0
        if self.store.message(under_way.answer).status == "stopped":  # by the user, who is here
            return
        self._is_unseen = not self.app_focus
        self._ring(is_due=took >= _LONG_SECONDS)
        self._show_in_terminal()

    def _ring(self, *, is_due: bool = False) -> None:
        """Ring where the user is elsewhere, or `is_due`."""
        if self.config.bell and (is_due or not self.app_focus):
            self.send_to_terminal("\x07")
