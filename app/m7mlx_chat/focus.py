"""The focus: which widget the keys go to."""

from __future__ import annotations

from textual.widget import Widget


def give_focus(widget: Widget) -> None:
    """Give a widget the focus at once: the keys that follow may have been pressed already.

    Textual's own `Widget.focus` gives it once the app has done all else that it has to do, which
    includes sending those keys to where the focus was before.
    """
    if widget.is_attached:
        widget.screen.set_focus(widget)
