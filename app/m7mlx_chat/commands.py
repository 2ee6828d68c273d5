"""What the user can do besides talking: copy, export, configure, tidy up. `ChatApp` adds the talking."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from rich.text import Text
from textual import on, work
from textual.app import SuspendNotSupported, SystemCommand
from textual.screen import ModalScreen, Screen

from m7mlx.errors import InputError
from m7mlx.terminal import visible
from m7mlx.units import in_gigabytes
from m7mlx_chat.actions import ACTIONS, COMMANDS
from m7mlx_chat.clipboard import code_blocks, copy_with_tool
from m7mlx_chat.config import Config, read_config, save, save_preset
from m7mlx_chat.files import free_name, write_new
from m7mlx_chat.portable import dumps, load_file
from m7mlx_chat.portable.page import to_html, to_markdown
from m7mlx_chat.screens.dialogs import Ask, Figures, Help, Search
from m7mlx_chat.screens.settings import SettingsDrawer
from m7mlx_chat.session import Session
from m7mlx_chat.settings import ENGINE, FIELDS, Settings
from m7mlx_chat.steady import SteadyApp
from m7mlx_chat.widgets.composer import Composer, Draft
from m7mlx_chat.widgets.messages import MessageView
from m7mlx_chat.widgets.sidebar import Sidebar
from m7mlx_chat.widgets.transcript import Transcript

_FORMATS = ("md", "html", "json")
_NOT_IN_PALETTE = ("stop", "interrupt", "command_palette")
_IN_DIALOGS = ("stop", "interrupt", "quit", "help")


class Commands(SteadyApp):
    """The app's commands, over a session that it shows."""

    def __init__(self, session: Session, config: Config) -> None:
        super().__init__()
        self.session = session
        self.store = session.store
        self.config = config
        self._deleted: list[int] = []  # conversations, the last one deleted at the end
        self._copied: tuple[int, int] = (0, 0)  # message, and which of its code blocks was copied last

    @property
    def composer(self) -> Composer:
        return self.screen_stack[0].query_one(Composer)

    @property
    def transcript(self) -> Transcript:
        return self.screen_stack[0].query_one(Transcript)

    @property
    def sidebar(self) -> Sidebar:
        return self.screen_stack[0].query_one(Sidebar)

    @property
    def selected(self) -> MessageView | None:
        """The message that is selected."""
        return self.focused if isinstance(self.focused, MessageView) else None

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """In a dialog only those of our keys work that make sense there."""
        ours = any(action == known.name.partition("(")[0] for known in ACTIONS)
        return not (ours and len(self.screen_stack) > 1 and action not in _IN_DIALOGS)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: the same actions, by name."""
        for action in ACTIONS:
            if action.place == "app" and action.name not in _NOT_IN_PALETTE and "(" not in action.name:
                title = f"/{action.slash}" if action.slash else action.name
                yield SystemCommand(
                    f"{title}  {action.shown}".strip(), action.help, getattr(self, f"action_{action.name}")
                )

    async def run_command(self, line: str) -> bool:
        """Run what was typed after "/"; whether there is such a command."""
        name, _, argument = line[1:].partition(" ")
        if name not in COMMANDS:
            self.tell(f"there is no command /{name}; F1 shows all", is_error=True)
            return False
        done = getattr(self, f"action_{COMMANDS[name].name}")(*([argument.strip()] if COMMANDS[name].takes else []))
        if done is not None:
            await done
        return True

    # --- copying and writing ----------------------------------------------------------------------------

    def action_copy(self, argument: str = "") -> None:
        answers = [m for m in map(self.session.message, self.session.line) if m.role == "assistant" and m.text]
        if argument == "all" and self.session.conversation is not None:
            head = self.store.conversation(self.session.conversation)
            branch = self.store.branch(self.session.line[-1]) if self.session.line else []
            self.copy_text(to_markdown(head, branch), "the conversation")
        elif not answers:
            self.tell("there is no answer yet")
        elif not argument:
            self.copy_text(answers[-1].text, "the answer")
        elif argument.isdecimal():
            self._copy_block(answers[-1].text, int(argument))
        else:
            raise InputError("/copy takes nothing, the number of a code block, or all")

    def action_copy_message(self) -> None:
        if self.selected is not None:
            self.copy_text(self.selected.text, "the message")

    def action_copy_code(self) -> None:
        if self.selected is not None:
            message, block = self._copied
            blocks = code_blocks(self.selected.text)
            number = block % max(1, len(blocks)) + 1 if message == self.selected.message.id else 1
            self._copied = (self.selected.message.id, number)
            self._copy_block(self.selected.text, number)

    def _copy_block(self, text: str, number: int) -> None:
        blocks = code_blocks(text)
        if not 1 <= number <= len(blocks):
            self.tell(f"there are {len(blocks)} code blocks in it" if blocks else "there is no code in it")
        else:
            self.copy_text(blocks[number - 1], f"code block {number} of {len(blocks)}")

    def copy_text(self, text: str, what: str = "") -> None:
        """Copy by a tool of the system, and by the terminal (OSC 52, which macOS's Terminal does not know)."""
        self.copy_to_clipboard(text)
        self._copy_with_tool(text)
        self.tell(f"copied {what}".strip())

    @work(thread=True)
    def _copy_with_tool(self, text: str) -> None:
        copy_with_tool(text)

    def action_export(self, argument: str = "") -> None:
        if self.session.conversation is None:
            raise InputError("there is nothing to export yet")
        first, _, rest = argument.partition(" ")
        kind, name = (first, rest.strip()) if first in _FORMATS else ("", argument)
        head = self.store.conversation(self.session.conversation)
        suffix = Path(name).suffix.removeprefix(".")
        kind = kind or (suffix if suffix in _FORMATS else "md")
        path = Path(os.path.expanduser(name)) if name else free_name(Path.cwd(), head.title, f".{kind}")
        if kind == "json":
            text = dumps(self.store.tree(head.id))
        else:
            branch = self.store.branch(self.session.line[-1]) if self.session.line else []
            text = (to_html if kind == "html" else to_markdown)(head, branch)
        write_new(path, text)
        self.tell(f"written to {path}")

    async def action_load(self, argument: str = "") -> None:
        if not argument:
            raise InputError("/import needs a file: ours (/export json), or ChatGPT's conversations.json")
        planted = self.store.plant(load_file(Path(os.path.expanduser(argument))))
        self.tell(f"{len(planted)} conversation{'s' if len(planted) != 1 else ''} imported")
        await self.open_conversation(planted[-1])

    # --- looking ----------------------------------------------------------------------------------------

    def action_help(self) -> None:
        if isinstance(self.screen, ModalScreen):
            self.pop_screen()
        else:
            self.push_screen(Help(self.config.keys))

    def action_stats(self) -> None:
        """Figures of every answer of the branch, the newest first."""
        table = Table.grid(padding=(0, 2))
        headings = ("", "tokens", "tok/s", "first after", "prompt", "reused", "tok/s", "peak memory")
        table.add_row(*(Text(heading, style="bold", justify="right") for heading in headings))
        answers = (
            [m for m in self.store.branch(self.session.line[-1]) if m.role == "assistant"]
            if self.session.line
            else []
        )
        for message in reversed(answers[-200:]):
            s = message.statistics
            numbers = (
                f"{s.get('generated_tokens', 0):,}",
                f"{s.get('generation_tps', 0):.1f}",
                f"{s.get('time_to_first_token', 0):.2f} s",
                f"{s.get('prompt_tokens', 0):,}",
                f"{s.get('reused_tokens', 0):,}",
                f"{s.get('prompt_tps', 0):,.0f}",
                in_gigabytes(s.get("peak_memory", 0), 2),
            )
            what = Text(" ".join(visible(message.text).split())[:24], style="dim", no_wrap=True)
            table.add_row(what, *(Text(number, justify="right") for number in numbers))
        title = f"What {len(answers)} answers cost" if answers else "Nothing has been answered yet"
        self.push_screen(Figures(title, table))

    def action_history(self) -> None:
        def take(text: str | None) -> None:
            if text is not None:
                self.composer.recall(text)

        self.push_screen(Search("What was asked before", lambda text: self.store.prompts(text, limit=100)), take)

    def action_editor(self) -> None:
        """The draft, in $EDITOR."""
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
        with tempfile.TemporaryDirectory(prefix="m7mlx-") as folder:
            path = Path(folder) / "message.md"
            path.write_text(self.composer.draft.message(), encoding="utf-8")
            try:
                with self.suspend():
                    status = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode
                text = path.read_text(encoding="utf-8", errors="replace")
            except SuspendNotSupported:
                self.tell("an editor cannot be opened in this terminal", is_error=True)
            except (OSError, ValueError) as error:
                self.tell(f"{editor} cannot be started ({error}); set $EDITOR", is_error=True)
            else:
                if status == 0:
                    self.composer.reset(Draft(text.rstrip("\n")))
        self.refresh()

    # --- settings ---------------------------------------------------------------------------------------

    def action_settings(self, argument: str = "") -> None:
        """The drawer; or one setting by name."""
        if argument:
            name, _, value = argument.partition(" ")
            if value:
                self.configure(self.session.settings.parsed(name, value))
            elif name not in FIELDS:
                raise InputError(f"there is no setting {name!r}; there are {', '.join(FIELDS)}")
            self.tell(f"{name}: {self.session.settings.shown(name)}")
        else:
            presets = sorted(self.config.presets)
            self.push_screen(SettingsDrawer(self.session.settings, presets, self.config.path))

    def action_system(self, argument: str = "") -> None:
        if argument:
            self.configure(self.session.settings.parsed("system", "" if argument == "off" else argument))
        system = self.session.settings.system
        self.tell(f"system prompt: {system}" if system else "there is no system prompt; /system TEXT sets one")

    def action_preset(self, argument: str = "") -> None:
        if not argument:
            raise InputError(
                f"name a preset: {', '.join(sorted(self.config.presets)) or 'there is none yet; F2 keeps one'}"
            )
        self.configure(self.session.settings.changed(self.config.preset(argument)))
        self.tell(f"settings of {argument}")

    def configure(self, settings: Settings) -> None:
        """Take other settings; where they concern the engine, it is set up anew."""
        before = self.session.settings
        self.session.configure(replace(settings, model=before.model))
        if settings.model != before.model:
            self.choose_model(settings.model)  # which takes it, if it is one
        elif any(getattr(settings, name) != getattr(before, name) for name in ENGINE):
            self.reload()

    @on(SettingsDrawer.Changed)
    def _settings_changed(self, event: SettingsDrawer.Changed) -> None:
        self.configure(event.settings)

    @on(SettingsDrawer.Preset)
    def _preset(self, event: SettingsDrawer.Preset) -> None:
        if event.keep:
            values = self.session.settings.given(FIELDS)
            values.pop("model", None)
            save_preset(self.config.path, event.name, values)
            self.config = read_config(self.config.path)
            self.tell(f"kept as {event.name}: /preset {event.name}, or --preset {event.name}")
        else:
            self.configure(self.session.settings.changed(self.config.preset(event.name)))
            if isinstance(self.screen, SettingsDrawer):
                self.screen.show(self.session.settings)

    def action_theme(self, argument: str = "") -> None:
        if not argument:
            self.search_themes()
        elif argument in self.available_themes:
            self.theme = argument
            save(self.config.path, {"theme": argument})
        else:
            raise InputError(f"there is no theme {argument!r}; there are {', '.join(sorted(self.available_themes))}")

    # --- conversations ----------------------------------------------------------------------------------

    def action_rename(self, argument: str = "") -> None:
        if self.session.conversation is not None:
            self._rename(self.session.conversation, argument)

    def action_rename_chosen(self) -> None:
        if (chosen := self.sidebar.conversations.chosen) is not None:
            self._rename(chosen, "")

    def _rename(self, conversation: int, title: str) -> None:
        def rename(title: str | None) -> None:
            if title is not None:
                self.store.rename(conversation, title)
                self.show_conversations()

        if title:
            rename(title)
        else:
            self.push_screen(
                Ask("Title (empty: the automatic one)", self.store.conversation(conversation).title), rename
            )

    async def action_archive(self) -> None:
        if self.session.conversation is not None:
            await self._archive(self.session.conversation)

    async def action_archive_chosen(self) -> None:
        if (chosen := self.sidebar.conversations.chosen) is not None:
            await self._archive(chosen)

    async def _archive(self, conversation: int) -> None:
        if self.store.conversation(conversation).archived:
            self.store.unarchive(conversation)
            self.tell("brought back")
        else:
            self.store.archive(conversation)
            self.tell("put away: v in the list shows what was put away; it is still found")
        self.show_conversations()

    async def action_delete(self) -> None:
        if self.session.conversation is not None:
            await self._delete(self.session.conversation)

    async def action_delete_chosen(self) -> None:
        if (chosen := self.sidebar.conversations.chosen) is not None:
            await self._delete(chosen)

    async def _delete(self, conversation: int) -> None:
        under_way = self.session.under_way
        if under_way is not None and under_way.conversation == conversation:
            raise InputError("it is being answered: Esc stops that")
        title = self.store.conversation(conversation).title
        self.store.delete(conversation)
        self._deleted.append(conversation)
        self.tell(f"deleted “{title}” · /undo brings it back")
        if conversation == self.session.conversation:
            self.session.new()
            await self.transcript.sync()
        self.show_conversations()

    async def action_undo(self) -> None:
        if not self._deleted:
            self.tell("nothing has been deleted")
            return
        conversation = self._deleted.pop()
        self.store.undo_delete(conversation)
        await self.open_conversation(conversation)

    def action_archived(self) -> None:
        self.sidebar.toggle_archived()

    # --- what ChatApp does ------------------------------------------------------------------------------

    async def open_conversation(self, conversation: int) -> None:
        raise NotImplementedError

    def show_conversations(self) -> None:
        raise NotImplementedError

    def choose_model(self, name: str) -> None:
        raise NotImplementedError

    def reload(self) -> None:
        raise NotImplementedError
