"""Which model answers: one rule for the chat on the screen and for -p."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from m7mlx.errors import M7Error
from m7mlx.files.hub import check_name
from m7mlx_chat.catalog import full_name, on_this_machine
from m7mlx_chat.config import Config
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import Store

_REMEMBERED = 50  # conversations, of which the newest with a model that is here counts


@dataclass(frozen=True)
class Choice:
    """A model to answer with.

    is_wanted  the user has chosen it, once or in config.toml: where it is not here, it is fetched;
               otherwise it is merely the default
    notes      what was passed over, and why
    """

    model: str
    is_wanted: bool
    notes: tuple[str, ...] = ()


def choose_model(named: str | None, config: Config, database: Path, own: Path | None = None) -> Choice:
    """The model that an option names, else that of the conversation that goes on, or of the last
    one, else that of config.toml, else the default.

    Only what an option or config.toml names is ever fetched. Of the models in `own`, which the chat
    has converted, the folder's name will do, as lists show it. Raises InputError for an option that
    can name no model.
    """
    if named is not None:
        named = full_name(named, own)
        check_name(named)
        return Choice(named, is_wanted=True)
    notes: list[str] = []
    remembered = _remembered(database)
    for model in remembered:
        if on_this_machine(model) is not None:
            return Choice(model, True, tuple(notes))
        if model == remembered[0]:
            notes.append(f"the model of the last conversation is not here: {model}")
    configured = config.values.get("model")
    if configured is not None:
        configured = full_name(configured, own)
        try:
            check_name(configured)
        except M7Error:
            notes.append(f"{config.path} names a model that is not there: {configured}")
        else:
            return Choice(configured, True, tuple(notes))
    return Choice(Settings().model, False, tuple(notes))


def _remembered(database: Path) -> list[str]:
    """The models of the last conversations, the newest first; none where nothing can be read."""
    with suppress(M7Error):
        if database.exists():
            with Store(database) as store:
                models = [one.model for one in store.conversations(limit=_REMEMBERED)]
                return list(dict.fromkeys(filter(None, models)))
    return []
