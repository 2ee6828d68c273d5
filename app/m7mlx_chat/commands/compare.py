"""Versions of a message beside each other; the same question to another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx_chat.commands.asking import AskCommands
from m7mlx_chat.focus import give_focus
from m7mlx_chat.screens.model_work import Chosen
from m7mlx_chat.screens.versions import SideBySide
from m7mlx_chat.store.rows import Message
from m7mlx_chat.under_way import UnderWay
from m7mlx_chat.view import Parts


@dataclass
class _Comparison:
    """An answer that another model's is to stand beside, and the model that was there before."""

    answer: int
    model: str
    folder: Path | None
    question: int | None = None  # once the other model is asked


class CompareCommands(AskCommands):
    """Comparing. The other model is loaded for one answer; then the one before comes back."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._comparison: _Comparison | None = None

    # --- versions that are there ------------------------------------------------------------------

    def action_versions(self) -> None:
        """Show the selected message beside the version before it."""
        if (selected := self.selected) is not None:
            versions = self.store.siblings(selected.message.id)
            if len(versions) < 2:
                self.tell("there is one version only: r answers again, e edits the question")
                return
            at = next(i for i, version in enumerate(versions) if version.id == selected.message.id)
            self._show_versions(versions, at - 1 if at else 1, at)

    def _show_versions(self, versions: Sequence[Message], left: int, right: int) -> None:
        async def take(chosen: int | None) -> None:
            if chosen is not None:
                self.session.show(chosen)
                await self.transcript.sync(at=chosen)
                give_focus(self.composer)

        self.push_screen(SideBySide(versions, left, right), take)

    # --- another model ----------------------------------------------------------------------------

    def action_compare(self, argument: str = "") -> None:
        """Have another model answer the last question, too, and show both answers."""
        self.session.check_free()
        last = self.store.message(self.session.line[-1]) if self.session.line else None
        if last is None or last.role != "assistant":
            raise InputError("there is no answer yet that another model's could stand beside")
        self._comparison = _Comparison(last.id, self.session.settings.model, self.folder)
        self.choose_model(argument)

    def folders_in_use(self) -> list[Path]:
        """Return those in use, and that of the model that comes back."""
        before = self._comparison.folder if self._comparison is not None else None
        return [*super().folders_in_use(), *([before] if before is not None else [])]

    async def model_chosen(self, chosen: Chosen | None) -> None:
        comparison = self._comparison
        if comparison is None or comparison.question is not None:  # or it was chosen meanwhile
            self._comparison = None
            await super().model_chosen(chosen)
        elif chosen is None:
            self._comparison = None
        else:
            self._load(chosen.name, chosen.folder)
            await self._begin(lambda: self.session.retry(comparison.answer))
            under_way = self.session.under_way
            comparison.question = under_way.question if under_way else None

    def end_comparison(self, under_way: UnderWay | None, failure: str | None) -> bool:
        """Bring the model of before back after the other one's answer; False if there was none.

        failure  why that could not be given
        """
        comparison = self._comparison
        if comparison is None or under_way is None or under_way.question != comparison.question:
            return False
        self._comparison = None
        self._load(comparison.model, comparison.folder)
        versions = self.store.siblings(under_way.answer)
        ids = [version.id for version in versions]
        if failure is not None:
            self.tell(failure, is_error=True)
        elif comparison.answer in ids and len(self.screen_stack) == 1:
            self._show_versions(versions, ids.index(comparison.answer), ids.index(under_way.answer))
        return True

    def _load(self, name: str, folder: Path | None) -> None:
        """Load a model. The conversation keeps the name of its own."""
        self.folder = folder
        self.session.settings = self.session.settings.changed({"model": name})
        self.load_model()
