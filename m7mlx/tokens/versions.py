"""The versions of Mistral's instruct format, and which of them a vocabulary was made for.

A file of Mistral's own states its version: tekken.json in its `config`, a sentencepiece model in
its name (tokenizer.model.v7). Other files state none. Then the control tokens say which versions
could be written, and the model's chat template which of these it is (`m7mlx.tokens.choice`).
"""

from __future__ import annotations

from typing import Literal, get_args

from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tokens.tokenizer_sentencepiece import SentencePieceTokenizer

Version = Literal["v1", "v2", "v3", "v7", "v11", "v13", "v15"]
VERSIONS: tuple[Version, ...] = get_args(Version)  # the oldest first
_TURNS = frozenset({"[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"})
_RESULTS = frozenset({"[TOOL_RESULTS]", "[/TOOL_RESULTS]"})
# What each version writes that the version before it does not.
_NEW: dict[Version, frozenset[str]] = {
    "v1": frozenset({"<s>", "</s>"}),
    "v2": _TURNS | _RESULTS,
    "v3": frozenset(),
    "v7": frozenset({"[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"}),
    "v11": frozenset({"[ARGS]", "[CALL_ID]"}),
    "v13": frozenset(),
    "v15": frozenset({"[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"}),
}
_V1_INST = [733, 16289, 28793]  # how the vocabulary of v1 writes [INST], which is text there


def number_of(version: Version) -> int:
    """Return the number of a version, by which they are ordered."""
    return int(version[1:])


def possible_versions(tokenizer: Tokenizer) -> list[Version]:
    """Return the versions that a tokenizer could be made for, the newest first.

    There is one at most where its file states one, and none where that is not known here or needs
    tokens that the vocabulary does not have.
    """
    names = tokenizer.control_ids().keys()
    needed: frozenset[str] = frozenset()
    found: list[Version] = []
    for version in VERSIONS:
        needed |= _NEW[version]
        if needed <= names and (version == "v1") == ("[INST]" not in names):
            found.insert(0, version)
    if tokenizer.stated_version is not None:
        return [version for version in found if version == tokenizer.stated_version]
    if found == ["v1"]:
        is_v1 = tokenizer.vocab_size >= 32000 and tokenizer.encode("[INST]") == _V1_INST
        return found if is_v1 else []
    # No weights were released for v2, and in sentencepiece each later version brought its tokens.
    found = [version for version in found if version != "v2"]
    return found[:1] if isinstance(tokenizer, SentencePieceTokenizer) else found
