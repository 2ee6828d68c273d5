"""Text to compare or to calibrate on, as a model's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m7mlx.errors import InputError
from m7mlx.paths import user_path
from m7mlx.tokens.load import load_tokenizer
from m7mlx.units import counted
from m7mlx_convert.progress import Reporter

DEFAULT_TOKENS = 512
_CHARACTERS = 32  # a token seldom has more: of a file of gigabytes only the start is read


@dataclass(frozen=True)
class Text:
    """Token ids and, for a report, the text of each."""

    ids: Sequence[int]
    pieces: Sequence[str]


def read_text(
    folder: Path,
    vocab_size: int,
    file: Path | None,
    tokens: int | None,
    reporter: Reporter,
) -> Text:
    """Read the start of a file in the ids of the model in `folder`.

    file    a text; None takes the passages that come with this package
    tokens  how many; None takes `DEFAULT_TOKENS`

    Raises InputError for a file that is no text or too short.
    """
    path = file or Path(__file__).with_name("passages.txt")
    tokens = tokens or DEFAULT_TOKENS
    text = read_start(path, tokens)
    tokenizer = load_tokenizer(folder, vocab_size)
    ids = tokenizer.encode(text, add_bos=tokenizer.add_bos)[:tokens]
    if len(ids) < 2:
        raise InputError(f"{path} is too short: it has {counted(len(ids), 'token')}")
    if len(ids) < tokens:
        reporter.note(f"{path.name} has {counted(len(ids), 'token')}, not {tokens:,}")
    return Text(ids, [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids])


def read_start(path: Path, tokens: int) -> str:
    """Read the start of a file, enough for so many tokens. Raises InputError if it is no text."""
    try:
        with user_path(path).open(encoding="utf-8") as stream:
            return stream.read(tokens * _CHARACTERS)
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text (UTF-8)") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
