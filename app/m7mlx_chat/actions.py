"""The one list of what the user can do: keys, commands, the palette and the help come from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from textual.binding import Binding, BindingType

Place = Literal["app", "message", "sidebar", "composer"]


class Action(NamedTuple):
    """`name` is `action_<name>` of the app, and the name in the user's key map.

    keys   default keys, separated by commas; none: by a slash command only
    shown  the keys as people call them
    slash  the command's name after "/"; `takes` is what may follow
    place  where the keys work: everywhere, on a selected message or in the sidebar; what is in the
           "composer" is done by the composer itself
    """

    name: str
    keys: str
    shown: str
    help: str
    slash: str = ""
    takes: str = ""
    place: Place = "app"


ACTIONS = (
    Action("send", "", "Enter", "send the message", place="composer"),
    Action("newline", "", "Ctrl+J, Alt+Enter", "new line", place="composer"),
    Action("prompt_history", "", "↑ ↓", "in the first or last line: what was asked before", place="composer"),
    Action("complete", "", "/ and @", "complete a command, or put a text file in", place="composer"),
    Action("editor", "ctrl+g", "Ctrl+G", "write the message in $EDITOR"),
    Action("stop", "escape", "Esc", "stop the answer and keep its text; close; back to the composer"),
    Action("interrupt", "ctrl+c", "Ctrl+C", "copy what is selected, clear the text or stop; twice: quit"),
    Action("new", "ctrl+n", "Ctrl+N", "new conversation", "new"),
    Action("retry", "", "", "answer the last question again", "retry"),
    Action("resume", "", "", "go on with an answer that was broken off", "continue"),
    Action("replay", "", "", "answer again with the same settings and seed", "replay"),
    Action("edit", "", "", "edit the last question and ask again", "edit"),
    Action("fork", "", "", "copy the conversation up to here into a new one", "fork"),
    Action("sidebar", "ctrl+b", "Ctrl+B", "show or hide the conversations"),
    Action("find", "ctrl+f", "Ctrl+F", "search all conversations", "find", "[TEXT]"),
    Action("history", "ctrl+r", "Ctrl+R", "search what was asked before"),
    Action("model", "ctrl+o", "Ctrl+O", "choose, download or convert a model", "model", "[NAME]"),
    Action("settings", "f2", "F2", "settings and presets", "set", "[NAME VALUE]"),
    Action("system", "", "", "show or change the system prompt", "system", "[TEXT]"),
    Action("preset", "", "", "take the settings of a preset", "preset", "NAME"),
    Action("window", "f3", "F3", "the rolling buffer, drawn", "window"),
    Action("stats", "f4", "F4", "what the answers cost", "stats"),
    Action("copy", "ctrl+y", "Ctrl+Y", "copy the last answer; or its nth code block, or all", "copy", "[N | all]"),
    Action("export", "", "", "write the conversation to a file", "export", "[md | html | json] [FILE]"),
    Action("import", "", "", "take in conversations: ours, or ChatGPT's", "import", "FILE"),
    Action("rename", "", "", "give the conversation a title", "rename", "[TITLE]"),
    Action("archive", "", "", "put the conversation away", "archive"),
    Action("delete", "", "", "delete the conversation; /undo brings it back", "delete"),
    Action("undo", "", "", "bring back what was deleted last", "undo"),
    Action("theme", "", "", "change the colours", "theme", "[NAME]"),
    Action("select(-1)", "alt+up", "Alt+↑", "select the message before"),
    Action("select(1)", "alt+down", "Alt+↓", "select the next message"),
    Action("scroll(-1)", "pageup", "PgUp", "scroll the conversation up"),
    Action("scroll(1)", "pagedown", "PgDn", "scroll the conversation down"),
    Action("command_palette", "ctrl+p", "Ctrl+P", "every command, by name"),
    Action("help", "f1", "F1", "this help", "help"),
    Action("quit", "ctrl+q", "Ctrl+Q", "quit", "bye"),
    Action("copy_message", "c", "c", "copy the message", place="message"),
    Action("copy_code", "y", "y", "copy its code block; again: the next one", place="message"),
    Action("edit_message", "e", "e", "edit the question and ask again", place="message"),
    Action("retry_message", "r", "r", "answer again", place="message"),
    Action("fork_message", "f", "f", "copy all up to here into a new conversation", place="message"),
    Action("thoughts", "t", "t", "show or hide what the model thought", place="message"),
    Action("sibling(-1)", "left_square_bracket", "[", "show the version before", place="message"),
    Action("sibling(1)", "right_square_bracket", "]", "show the next version", place="message"),
    Action("rename_chosen", "r", "r", "give it a title", place="sidebar"),
    Action("archive_chosen", "a", "a", "put it away, or bring it back", place="sidebar"),
    Action("delete_chosen", "d,delete", "d", "delete it", place="sidebar"),
    Action("undo", "u", "u", "bring back what was deleted last", place="sidebar"),
    Action("archived", "v", "v", "show what was put away, or not", place="sidebar"),
)
COMMANDS = {action.slash: action for action in ACTIONS if action.slash}


def bindings(place: Place) -> list[BindingType]:
    """The keys of a place. Those of the app have priority: they work whatever has the focus."""
    prefix = "" if place == "app" else "app."
    return [
        Binding(a.keys, prefix + a.name, a.help, id=key_name(a), tooltip=a.help, show=False, priority=place == "app")
        for a in ACTIONS
        if a.keys and a.place == place
    ]


def key_name(action: Action) -> str:
    """The name of an action in the user's key map: `select(-1)` is "select_previous" there."""
    name = action.name.replace("(-1)", "_previous").replace("(1)", "_next")
    return name if action.place in ("app", "composer") else f"{action.place}_{name}"


def unknown_keys(keys: Mapping[str, str]) -> list[str]:
    """Names in a key map that no action has."""
    names = {key_name(action) for action in ACTIONS if action.keys}
    return [name for name in keys if name not in names]
