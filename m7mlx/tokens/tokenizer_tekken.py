"""tekken.json (Mistral's own file since 2024): bytes and ranks, merged by `tiktoken`.

The first ids are the special tokens, which the library never sees: no text can become one. The
file may name fewer than it has room for; the others are called <SPECIAL_n>, as in mistral-common.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m7mlx.errors import ConfigError, TokenizerError
from m7mlx.jsonfile import read_json, said
from m7mlx.tokens.tokenizer import MOST_BYTES, Tokenizer, replace_surrogates
from m7mlx.tokens.tokenizer_json import byte_level_name

# The special tokens of files that name none, which v3 and v7 may.
_UNNAMED = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip
_NAMES_MAY_LACK = ("v1", "v2", "v3", "v7")
_MOST_SPACES = 500_000  # in a row; the library's regular expressions overflow with twice as many
_SPACES = re.compile(rf"\s{{{_MOST_SPACES + 1}}}")


class TekkenTokenizer(Tokenizer):
    """Byte-level BPE from ranks.

    settings  which settings a prompt may tell the model, as in the file (`model_settings_builder`)
    """

    add_bos = True
    adds_leading_space = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            data = read_json(path, MOST_BYTES)
            config = data["config"]
            size, n_special = _count(config["default_vocab_size"]), _count(config["default_num_special_tokens"])
            self.stated_version = str(config["version"])
            self._pattern = str(config["pattern"])
            self._special = _special_names(data.get("special_tokens"), n_special, self.stated_version)
            self._tokens = _bytes_by_rank(data["vocab"], size - n_special)
            self.settings: Mapping[str, Any] = data.get("model_settings_builder") or {}
            self._library = _library(self._pattern, self._tokens)
        except ConfigError as error:
            raise TokenizerError(str(error)) from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TokenizerError(f"{path} is not a tekken file, or damaged ({said(str(error))})") from None
        self.vocab_size = size
        self._controls = {name: i for i, name in enumerate(self._special)}
        if not {"<s>", "</s>"} <= self._controls.keys():
            raise TokenizerError(f"{path} has no tokens <s> and </s>, which start a text and end an answer")
        self.bos_id = self._controls["<s>"]
        self.eos_ids = frozenset({self._controls["</s>"]})

    def _encode_mixed(self, parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        if len(text) > _MOST_SPACES and _SPACES.search(text):
            raise TokenizerError(f"the text has more than {_MOST_SPACES:,} spaces in a row; leave some out")
        try:
            ranks = self._library.encode_ordinary(replace_surrogates(text))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library panics where a file's own pattern takes too long
            raise TokenizerError(f"the tokenizer's pattern cannot cut this text ({said(str(error))})") from None
        first = len(self._special)
        return [first + rank for rank in ranks]

    def is_control(self, token: int) -> bool:
        return 0 <= token < len(self._special)

    def is_shown(self, token: int) -> bool:
        return not self.is_control(token)

    def control_ids(self) -> Mapping[str, int]:
        return self._controls

    def added_tokens(self) -> Mapping[str, int]:
        return self._controls

    def vocabulary(self) -> dict[str, int]:  # pieces as a tokenizer.json writes them
        pieces = {byte_level_name(data): i for i, data in enumerate(self._tokens, len(self._special))}
        return pieces | self._controls

    def _token_bytes(self, token: int) -> bytes:
        return self._tokens[token - len(self._special)]

    def library(self) -> tuple[str, bytes]:
        return "tiktoken", json.dumps({"pattern": self._pattern, "first": len(self._special)}).encode()

    def starts_with_space(self, token: int) -> bool:
        return False


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 24:
        raise ValueError(f"{said(value)} is no number of tokens")
    return value


def _special_names(given: Any, count: int, version: str) -> list[str]:
    """Return the names of all special tokens, in the order of their ids."""
    if given is None and version not in _NAMES_MAY_LACK:
        raise ValueError(f"special_tokens is missing, without which {version} cannot be read")
    names = _UNNAMED if given is None else [token["token_str"] for token in given]
    if given is not None and [token["rank"] for token in given] != list(range(len(given))):
        raise ValueError("special_tokens are not in the order of their ranks")
    names = [*names, *(f"<SPECIAL_{i}>" for i in range(len(names), count))]
    if len(names) != count or len(set(names)) < count or not all(isinstance(n, str) and n for n in names):
        raise ValueError("special_tokens are too many, or two have one name")
    return names


def _bytes_by_rank(vocab: Any, count: int) -> list[bytes]:
    """Return the bytes of the first `count` tokens; the file has more than a model may use."""
    if not isinstance(vocab, list) or not 256 <= count <= len(vocab):
        raise ValueError("vocab has too few tokens")
    tokens = []
    for rank, token in enumerate(vocab[:count]):
        if token["rank"] != rank:
            raise ValueError("vocab is not in the order of its ranks")
        try:
            tokens.append(base64.b64decode(token["token_bytes"], validate=True))
        except binascii.Error:
            raise ValueError(f"token {rank} is not base64") from None
    if tokens[:256] != [bytes([byte]) for byte in range(256)]:
        raise ValueError("vocab does not begin with all bytes")
    if len(set(tokens)) < count:
        raise ValueError("a token stands twice in vocab")
    return tokens


def _library(pattern: str, tokens: Sequence[bytes]) -> Any:
    import tiktoken  # 40 ms: only for these files

    ranks = {data: rank for rank, data in enumerate(tokens)}
    return tiktoken.Encoding("tekken", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
