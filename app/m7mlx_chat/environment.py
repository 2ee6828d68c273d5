"""What the environment says, read once at the start and passed on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from m7mlx.paths import cache_dir

ENGINE_FILE = "M7MLX_ENGINE_FILE"  # for a page's process alone: those that it starts know it not


@dataclass(frozen=True)
class Programs:
    """Where other programs keep models.

    lm_studio  LM Studio's folders, which have `models` in them
    ollama     Ollama's folders of models
    """

    lm_studio: tuple[Path, ...] = ()
    ollama: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Environment:
    """Where the chat's files lie, and where it is shown.

    data        the folder of conversations and converted models: $M7MLX_DATA, or the user's own
    config      the user's config.toml: in $M7MLX_CONFIG, or in the user's configuration folder
    log         the file that says more than a line in the corner can; made anew by each start
    editor      the command that opens a text: $VISUAL, $EDITOR or vi
    in_browser  the screen is a browser's page: `m7mlx_chat.web` has started this process
    is_dumb     the terminal cannot place the cursor
    engine      the open file that leads to the engine of all pages, in a browser
    programs    where other programs keep models
    """

    data: Path
    config: Path
    log: Path
    editor: str = "vi"
    in_browser: bool = False
    is_dumb: bool = False
    engine: int | None = None
    programs: Programs = Programs()

    @property
    def database(self) -> Path:
        """The file of all conversations."""
        return self.data / "chats.db"

    @property
    def tools(self) -> Path:
        """The file of what the user has said of tools."""
        return self.data / "tools.json"

    @property
    def copies(self) -> Path:
        """The folder of what has been read of conversations, which go on at once that way."""
        return self.data / "copies"

    @property
    def models(self) -> Path:
        """The folder for models that the chat converts."""
        return self.data / "models"


def read_environment() -> Environment:
    """Read the variables of this process."""
    folder = os.environ.get("M7MLX_CONFIG") or platformdirs.user_config_dir("m7mlx")
    return Environment(
        data=Path(os.environ.get("M7MLX_DATA") or platformdirs.user_data_dir("m7mlx")),
        config=Path(folder) / "config.toml",
        log=cache_dir() / "chat.log",
        editor=os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi",
        in_browser="TEXTUAL_DRIVER" in os.environ,
        is_dumb=os.environ.get("TERM") == "dumb",
        engine=int(engine) if (engine := os.environ.pop(ENGINE_FILE, "")).isdecimal() else None,
        programs=_programs(),
    )


def _programs() -> Programs:
    home = Path(os.path.expanduser("~"))
    named = os.environ.get("OLLAMA_MODELS")
    # The last is where Ollama's service on Linux keeps them.
    ollama = (Path(named),) if named else (home / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models"))
    return Programs(lm_studio=(home / ".lmstudio", home / ".cache" / "lm-studio"), ollama=ollama)
