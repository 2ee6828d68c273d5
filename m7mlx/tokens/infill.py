"""The text between two others: prompts of models that fill in the middle, such as Codestral."""

from __future__ import annotations

from m7mlx.errors import InputError
from m7mlx.tokens.tokenizer import Tokenizer

_MARKER = "☺"  # two ids in front of a text, so that it gets no space there; mistral-common's


def infill_ids(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Return the ids of a prompt whose answer stands between `prefix` and `suffix`.

    Raises InputError for a model without tokens for it.
    """
    before, after = (tokenizer.control_id(name) for name in ("[PREFIX]", "[SUFFIX]"))
    if before is None or after is None or tokenizer.bos_id is None:
        raise InputError("this model cannot fill in the middle of a text; leave out the suffix")
    behind = tokenizer.encode(_MARKER + suffix)[2:] if suffix else []
    return [tokenizer.bos_id, after, *behind, before, *tokenizer.encode(prefix)]
