"""The slash commands of the line mode, by the names that `m7mlx_chat.actions` gives them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx.terminal import one_line
from m7mlx.units import counted
from m7mlx_chat.actions import ACTIONS, parse_command
from m7mlx_chat.clipboard import copy_with_tool
from m7mlx_chat.config import Config
from m7mlx_chat.environment import Environment
from m7mlx_chat.events import AnyEngine
from m7mlx_chat.exporting import export, text_to_copy
from m7mlx_chat.figures import HEADINGS, figures
from m7mlx_chat.plain.conversations import ConversationLines
from m7mlx_chat.plain.reading import Lines
from m7mlx_chat.plain.writing import Written
from m7mlx_chat.portable import read_file
from m7mlx_chat.prompts import Prompts, filled, kept_question, variables
from m7mlx_chat.session import Session
from m7mlx_chat.settings import ANSWER, ENGINE, FIELDS
from m7mlx_chat.tools.change import change_tools
from m7mlx_chat.under_way import UnderWay

_LISTED = 20  # answers, of which figures are told


class LineCommands(ConversationLines):
    """A method `action_<name>` for each action with a slash that needs no screen.

    left        the user leaves
    has_failed  something could not be done
    """

    def __init__(
        self,
        session: Session,
        engine: AnyEngine,
        config: Config,
        environment: Environment,
        lines: Lines,
        written: Written,
    ) -> None:
        super().__init__(session, engine, environment, written)
        self.config = config
        self.lines = lines
        self.left = self.has_failed = False

    def answer(self, begin: Callable[[], UnderWay]) -> None:
        """Begin an answer and print it."""
        raise NotImplementedError

    def run_command(self, line: str) -> None:
        """Run what was typed after "/". Raises InputError for what can only be done on a screen."""
        if (command := parse_command(line)) is None:
            raise InputError(f"there is no command {line.partition(' ')[0]}; /help shows all")
        action, arguments = command
        if (do := getattr(self, f"action_{action.name}", None)) is None:
            raise InputError(f"/{action.slash} needs the chat on a screen")
        do(*arguments)

    # --- asking -----------------------------------------------------------------------------------

    def action_retry(self) -> None:
        self.answer(self.session.retry)

    def action_resume(self) -> None:
        self.answer(self.session.resume)

    def action_replay(self) -> None:
        self.answer(self.session.replay)

    def action_edit(self) -> None:
        question = self.session.last_question
        if question is None:
            raise InputError("nothing has been asked yet")
        if "\n" in question.text:
            self.written.tell(question.text)
        self.written.tell("Write the question anew; an empty line leaves it as it is.")
        text = self.lines.edited(question.text)
        if text is not None and text.strip() and text != question.text:
            self.answer(lambda: self.session.edit(question.id, text))

    def action_begin(self, text: str = "") -> None:
        """Have the last question answered again, beginning with a text."""
        self.answer(lambda: self.session.begin_with(text))

    def action_prompt(self, argument: str = "") -> None:
        """Send a prompt by name, its variables asked for; or keep the last question as one."""
        prompts = Prompts(self.config.prompts)
        first, _, name = argument.partition(" ")
        if first == "save":
            self.written.tell(f"kept in {kept_question(prompts, self.session, name.strip())}")
        elif argument:
            text = prompts.read(argument)
            values = {one: self.lines.message(f"{one}: ") or "" for one in variables(text)}
            self.answer(lambda: self.session.ask(filled(text, values)))
        else:
            names = prompts.names()
            self.written.tell(", ".join(names) or f"no prompts yet; put text files (NAME.md) into {prompts.folder}")

    def action_tools(self, argument: str = "") -> None:
        """List the tools; turn them on or off; have one asked about again."""
        if (told := change_tools(self.session.tools, argument)) is not None:
            self.written.tell(told)
            return
        for one in self.session.tools.overview():
            self.written.tell(f"{one.server}: {one.state}{f' ({one.why})' if one.why else ''}")
            for name, description, word in one.tools:
                self.written.tell(f"  {one_line(name)} ({word}): {one_line(description)}")

    def action_compare(self, argument: str = "") -> None:
        """Have another model answer the last question as well; the one before comes back."""
        if not argument:
            raise InputError("/compare needs the name of a model; /model lists them")
        if not self.session.line:
            raise InputError("nothing has been asked yet")
        before, answer = self.session.settings.model, self.session.line[-1]
        self.action_model(argument)
        try:
            self.answer(lambda: self.session.retry(answer))
        finally:
            self.action_model(before)

    # --- out and in -------------------------------------------------------------------------------

    def action_export(self, argument: str = "") -> None:
        self.written.tell(f"written to {export(self.session, argument)}")

    def action_import(self, argument: str = "") -> None:
        if not argument:
            raise InputError("/import needs a file: ours (/export json), or ChatGPT's conversations.json")
        imported = read_file(Path(os.path.expanduser(argument)))
        planted = self.store.plant(imported.trees)
        self.written.tell(imported.told())
        self.open_conversation(planted[-1])

    def action_copy(self, argument: str = "") -> None:
        text, what = text_to_copy(self.session, argument)
        if not copy_with_tool(text):
            raise InputError("copying needs one of pbcopy, wl-copy and xclip")
        self.written.tell(f"copied {what}")

    # --- settings ---------------------------------------------------------------------------------

    def action_settings(self, argument: str = "") -> None:
        """Show all settings; or show or change one."""
        name, _, value = argument.partition(" ")
        if value:
            self.configure(self.session.settings.parsed(name, value))
        elif name and name not in FIELDS:
            raise InputError(f"there is no setting {name!r}; there are {', '.join(FIELDS)}")
        for one in [name] if name else [*ANSWER, *ENGINE]:
            about = "" if name else f"  ({FIELDS[one].help})"
            self.written.tell(f"{one}: {self.session.settings.shown(one)}{about}")

    def action_system(self, argument: str = "") -> None:
        if argument:
            self.configure(self.session.settings.parsed("system", "" if argument == "off" else argument))
        system = self.session.settings.system
        self.written.tell(f"system prompt: {system}" if system else "no system prompt; /system TEXT sets one")

    def action_preset(self, argument: str = "") -> None:
        if not argument:
            names = ", ".join(sorted(self.config.presets)) or f"none yet; they stand in {self.config.path}"
            raise InputError(f"name a preset: {names}")
        self.configure(self.session.settings.changed(self.config.preset(argument)))
        self.written.tell(f"settings of {argument}")

    # --- looking ----------------------------------------------------------------------------------

    def action_window(self) -> None:
        """Tell how much of the conversation the model can see: the picture, in words."""
        seen, ready = self.session.seen_here, self.session.ready
        if ready is None:
            raise InputError("no model is loaded")
        limit = ready.window or ready.context
        text = f"{'window' if ready.window else 'context'}: {min(seen.tokens, limit):,} of {counted(limit, 'token')}"
        if ready.window and seen.tokens > ready.window:
            text += f", {seen.tokens - ready.window:,} beyond"
        self.written.tell(f"{text}, {seen.cache_bytes / 1e6:,.0f} MB")

    def action_stats(self) -> None:
        answers = [message for message in self.session.branch if message.role == "assistant"]
        for message in reversed(answers[-_LISTED:]):
            cost = ", ".join(f"{name} {figure}" for name, figure in zip(HEADINGS, figures(message), strict=True))
            self.written.tell(f"{' '.join(message.text.split())[:24]}: {cost}")
        if not answers:
            self.written.tell("Nothing has been answered yet")

    def action_help(self) -> None:
        for action in ACTIONS:
            if action.slash:
                self.written.tell(f"{f'/{action.slash} {action.takes}'.strip()}: {action.help}")
        self.written.tell(
            'A line that ends with \\ goes on in the next; """ begins and ends several lines; @FILE puts a text '
            "file in. Ctrl-C stops an answer; Ctrl-D leaves."
        )

    def action_quit(self) -> None:
        self.left = True
