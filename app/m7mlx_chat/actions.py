"""The one list of what the user can do: keys, commands, the palette and the help come from it."""

from __future__ import annotations

import re
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
    hint   what the key does, in a word, for the line that shows the keys of a place
    """

    name: str
    keys: str
    shown: str
    help: str
    slash: str = ""
    takes: str = ""
    place: Place = "app"
    hint: str = ""


ACTIONS = (
    Action("send", "", "Enter", "send the message", place="composer"),
    Action("newline", "", "Ctrl+J, Alt+Enter", "new line", place="composer"),
    Action("prompt_history", "", "↑ ↓", "in the first or last line: what was asked before", place="composer"),
    Action("undo_text", "", "Ctrl+Z", "take back what was changed or cleared in the text", place="composer"),
    Action(
        "complete", "", "/ and @", "complete a command, or put in a text file, a PDF or a folder", place="composer"
    ),
    Action("editor", "ctrl+g", "Ctrl+G", "write the message in $EDITOR"),
    Action(
        "stop",
        "escape",
        "Esc",
        "stop the answer and keep its text; take back what waits; close",
    ),
    Action("interrupt", "ctrl+c", "Ctrl+C", "copy what is selected, clear the text or stop; twice: quit"),
    Action("new", "ctrl+n", "Ctrl+N", "new conversation", "new"),
    Action("retry", "", "", "answer the last question again", "retry"),
    Action("resume", "", "", "go on with an answer that was broken off", "continue"),
    Action("replay", "", "", "answer again with the same settings and seed", "replay"),
    Action("compare", "", "", "have another model answer, too, and see both", "compare", "[MODEL]"),
    Action("edit", "", "", "edit the last question and ask again", "edit"),
    Action("begin", "", "", "answer again, beginning with TEXT", "begin", "TEXT"),
    Action("fork", "", "", "copy the conversation up to here into a new one", "fork"),
    Action("sidebar", "ctrl+b", "Ctrl+B", "show or hide the conversations"),
    Action("find", "ctrl+f", "Ctrl+F", "search all conversations", "find", "[TEXT]"),
    Action("prompt", "", "", "use a prompt of your own, or keep one", "prompt", "[NAME | save NAME]"),
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
    Action("pin", "", "", "keep it at the top of the list, or no longer", "pin"),
    Action("tag", "", "", "change its tags; #TAG in the search finds them", "tag", "[TAG | -TAG]"),
    Action("archive", "", "", "put the conversation away", "archive"),
    Action("delete", "", "", "delete the conversation; /undo brings it back", "delete"),
    Action("undo", "", "", "bring back what was deleted last", "undo"),
    Action("tools", "", "", "the tools that the model may call", "tools", "[off | on | ask NAME]"),
    Action("theme", "", "", "change the colours", "theme", "[NAME]"),
    Action("select(-1)", "alt+up", "Alt+↑", "select the message before"),
    Action("select(1)", "alt+down", "Alt+↓", "select the next message"),
    Action("go_to_end(-1)", "ctrl+home", "Ctrl+Home", "the beginning of the conversation"),
    Action("go_to_end(1)", "ctrl+end", "Ctrl+End", "its end"),
    Action("scroll(-1)", "pageup", "PgUp", "scroll the conversation up"),
    Action("scroll(1)", "pagedown", "PgDn", "scroll the conversation down"),
    Action("command_palette", "ctrl+p", "Ctrl+P", "every command, by name"),
    Action("help", "f1", "F1", "this help", "help"),
    Action("quit", "ctrl+q", "Ctrl+Q", "quit", "bye"),
    Action("copy_message", "c", "c", "copy the message", place="message", hint="copy"),
    Action("copy_code", "y", "y", "copy its code block; again: the next one", place="message", hint="code"),
    Action("edit_message", "e", "e", "edit the question and ask again; or the answer", place="message", hint="edit"),
    Action("retry_message", "r", "r", "answer again", place="message", hint="again"),
    Action("fork_message", "f", "f", "copy all up to here into a new conversation", place="message", hint="fork"),
    Action("thoughts", "t", "t", "show or hide what the model thought, or a long question", place="message"),
    Action("wrap_code", "w", "w", "wrap long lines of code, or not", place="message", hint="wrap"),
    Action("sibling(-1)", "left_square_bracket", "[", "show the version before", place="message"),
    Action("sibling(1)", "right_square_bracket", "]", "show the next version", place="message", hint="next"),
    Action("versions", "v", "v", "see two versions beside each other", place="message", hint="versions"),
    Action("rename_chosen", "r", "r", "give it a title", place="sidebar", hint="title"),
    Action("pin_chosen", "p", "p", "keep it at the top of the list, or no longer", place="sidebar", hint="pin"),
    Action("tag_chosen", "number_sign", "#", "change its tags", place="sidebar", hint="tags"),
    Action("archive_chosen", "a", "a", "put it away, or bring it back", place="sidebar", hint="away"),
    Action("delete_chosen", "d,delete", "d", "delete it", place="sidebar", hint="delete"),
    Action("undo", "u", "u", "bring back what was deleted last", place="sidebar", hint="undo"),
    Action("archived", "v", "v", "show what was put away, or not", place="sidebar", hint="those away"),
    Action("trash", "t", "t", "show what was deleted, or not", place="sidebar", hint="trash"),
)
COMMANDS = {action.slash: action for action in ACTIONS if action.slash}
# What people type who come from elsewhere.
_OTHER_NAMES = {"quit": "bye", "exit": "bye", "clear": "new"}
COMMANDS |= {other: COMMANDS[name] for other, name in _OTHER_NAMES.items()}
_COMMAND = re.compile(r"/[a-z]+( .*)?", re.DOTALL)


def is_command(text: str) -> bool:
    """Whether a message has the form of a slash command."""
    return _COMMAND.fullmatch(text) is not None


def parse_command(line: str) -> tuple[Action, list[str]] | None:
    """The action of a slash command, and its arguments; None if there is no such command."""
    name, _, argument = line[1:].partition(" ")
    if name not in COMMANDS:
        return None
    action = COMMANDS[name]
    return action, [argument.strip()] if action.takes else []


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


def hints(place: Place, keys: Mapping[str, str]) -> str:
    """The line that shows the keys of a place; `keys` are the user's own."""
    return " · ".join(f"{keys.get(key_name(a), a.shown)} {a.hint}" for a in ACTIONS if a.place == place and a.hint)


def unknown_keys(keys: Mapping[str, str]) -> list[str]:
    """Names in a key map that no action has."""
    names = {key_name(action) for action in ACTIONS if action.keys}
    return [name for name in keys if name not in names]
