"""The one place that runs an action, for a key, a slash command, the palette or a click.

Keys and clicks reach `action_<name>` by Textual's own way, which `check_action` governs; slash
commands and the palette by `perform`. What an action raises is told in the corner by `steady.py`,
which all of these ways lead through.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from inspect import isawaitable

from textual.app import SystemCommand
from textual.screen import Screen

from m7mlx_chat.actions import ACTIONS, Action, bindings, parse_command
from m7mlx_chat.steady import SteadyApp

_NOT_IN_PALETTE = ("stop", "interrupt", "command_palette")
_IN_DIALOGS = ("stop", "interrupt", "quit", "help")
_NAMES = {action.name.partition("(")[0] for action in ACTIONS}


class DispatchingApp(SteadyApp):
    """An app that can do what `ACTIONS` lists."""

    BINDINGS = bindings("app")

    async def perform(self, action: Action, *arguments: str) -> None:
        """Run an action. Raises what it raises."""
        done = getattr(self, f"action_{action.name}")(*arguments)
        if isawaitable(done):
            await done

    async def run_command(self, line: str) -> bool:
        """Run what was typed after "/"; returns whether there is such a command."""
        if (command := parse_command(line)) is None:
            self.tell(f"there is no command {line.partition(' ')[0]}; F1 shows all", is_error=True)
            return False
        action, arguments = command
        await self.perform(action, *arguments)
        return True

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Allow, in a dialog, only those of the chat's own actions that make sense there."""
        return not (action in _NAMES and len(self.screen_stack) > 1 and action not in _IN_DIALOGS)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Fill the palette with the same actions, by name."""
        for action in ACTIONS:
            if action.place == "app" and action.name not in _NOT_IN_PALETTE and "(" not in action.name:
                title = f"/{action.slash}" if action.slash else action.name
                yield SystemCommand(f"{title}  {action.shown}".strip(), action.help, partial(self.perform, action))
