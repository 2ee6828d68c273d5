"""The one list of what the user can do: key bindings and the help screen are both drawn from it."""

from __future__ import annotations

from typing import NamedTuple

from textual.binding import Binding, BindingType


class Action(NamedTuple):
    """`name` is the app's `action_<name>`; no keys: done by the composer itself."""

    name: str
    keys: str
    shown: str
    help: str


ACTIONS = (
    Action("send", "", "Enter", "send the message"),
    Action("newline", "", "Ctrl+J, Alt+Enter", "new line"),
    Action("stop", "escape", "Esc", "stop the answer and keep its text"),
    Action("new", "ctrl+n", "Ctrl+N", "new conversation"),
    Action("copy_answer", "ctrl+y", "Ctrl+Y", "copy the last answer"),
    Action("interrupt", "ctrl+c", "Ctrl+C", "copy, clear the draft or stop; twice: quit"),
    Action("scroll('up')", "pageup", "PgUp", "scroll the conversation up"),
    Action("scroll('down')", "pagedown", "PgDn", "scroll the conversation down"),
    Action("help", "f1", "F1", "this help"),
    Action("quit", "ctrl+q", "Ctrl+Q", "quit"),
)

BINDINGS: list[BindingType] = [
    # Priority: they work whatever has the focus.
    Binding(a.keys, a.name, a.help, id=a.name.split("(")[0] + a.keys, tooltip=a.help, show=False, priority=True)
    for a in ACTIONS
    if a.keys
]
