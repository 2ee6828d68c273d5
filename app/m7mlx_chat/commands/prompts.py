"""The user's own prompts: choosing one, filling it in, keeping one."""

from __future__ import annotations

from m7mlx.errors import InputError
from m7mlx_chat.prompts import Prompts, filled, kept_question, variables
from m7mlx_chat.screens.dialogs import Form, Search
from m7mlx_chat.view import ChatView


class PromptCommands(ChatView):
    """What puts a prompt into the composer, to be read once more before it is sent."""

    @property
    def _prompts(self) -> Prompts:
        return Prompts(self.config.prompts)

    def action_prompt(self, argument: str = "") -> None:
        """Use a prompt by name, or choose one; or keep the last question as one."""
        first, _, name = argument.partition(" ")
        if first == "save":
            self._keep(name.strip())
        elif argument:
            self._use(argument)
        else:
            names = self._prompts.names()
            if not names:
                raise InputError(
                    f"there are no prompts yet: put text files (NAME.md) into {self._prompts.folder}, "
                    "or /prompt save NAME keeps the last question as one"
                )
            self.push_screen(Search("Your prompts", lambda text: _like(text, names)), self._prompt_chosen)

    def _prompt_chosen(self, name: str | None) -> None:
        if name is not None:
            self._use(name)

    def _use(self, name: str) -> None:
        text = self._prompts.read(name)

        def take(values: dict[str, str] | None) -> None:
            if values is not None:
                self.drafts.clear()
                self.composer.recall(filled(text, values))

        if asked := variables(text):
            self.push_screen(Form(name, asked), take)
        else:
            take({})

    def _keep(self, name: str) -> None:
        path = kept_question(self._prompts, self.session, name)
        self.tell(f"kept: /prompt {name} · in {path}, {{{{word}}}} makes a word a variable")


def _like(text: str, names: list[str]) -> list[str]:
    return [name for name in names if text.lower() in name.lower()]
