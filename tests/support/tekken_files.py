"""tekken.json of every version, and what mistral-common makes of it.

Only those of v3 are shipped; a later one is the same vocabulary with its version and its special
tokens.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from models import mistral_file

SHIPPED = {name: mistral_file("v1").with_name(f"tekken_{name}.json") for name in ("240718", "240911")}
TEKKEN_VERSIONS = ["v3", "v7", "v11", "v13", "v15"]
_SPECIAL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]  # fmt: skip
_LATER = {
    "v3": [],
    "v7": [],
    "v11": ["[ARGS]", "[CALL_ID]"],
    "v13": ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"],
    "v15": ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"],
}
SETTINGS = {
    "reasoning_effort": {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none"},
    "json_schema": {"type": "json_schema"},
}
SIZE, N_SPECIAL = 12_000, 100  # of the vocabularies made here: large enough for every byte and most words


@cache
def _shipped() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(SHIPPED["240911"].read_text())
    data["vocab"] = data["vocab"][: SIZE - N_SPECIAL]
    del data["image"]
    return data


def tekken_data(version: str, *, thinks: bool = True, **changes: Any) -> dict[str, Any]:
    """The content of a tekken.json; `changes` are of its config."""
    names = _SPECIAL + [name for name in _LATER.get(version, _LATER["v15"]) if thinks or "THINK" not in name]
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    config = {"version": version, "default_vocab_size": SIZE, "default_num_special_tokens": N_SPECIAL}
    data = _shipped()
    data = data | {"config": data["config"] | config | changes, "special_tokens": special}
    return data | ({"model_settings_builder": SETTINGS} if version == "v15" else {})


def write_tekken(folder: Path, version: str, **changes: Any) -> Path:
    """Write a folder's tekken.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(tekken_data(version, **changes)))
    return folder


def byte_level_json_of(data: dict[str, Any]) -> dict[str, Any]:
    """A tekken.json as Hugging Face would write it to a tokenizer.json."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    n_special = data["config"]["default_num_special_tokens"]
    names = [token["token_str"] for token in data["special_tokens"]]
    names += [f"<SPECIAL_{i}>" for i in range(len(names), n_special)]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in data["vocab"]}
    merges = []
    for piece, rank in ranks.items():
        splits = [(piece[:n], piece[n:]) for n in range(1, len(piece)) if {piece[:n], piece[n:]} <= ranks.keys()]
        merges += [(rank, ranks[a], ranks[b], a, b) for a, b in splits]
    written = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    flags = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": data["config"]["pattern"]},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(names)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {name: i for i, name in enumerate(names)}
            | {written[piece]: n_special + rank for piece, rank in ranks.items()},
            "merges": [[written[a], written[b]] for *_, a, b in sorted(merges)],
        },
    }


def mistral_common_of(folder: Path) -> MistralTokenizer[Any, Any, Any, Any, Any]:
    """What mistral-common makes of a folder's tekken.json, or of a file."""
    return MistralTokenizer.from_file(str(folder / "tekken.json" if folder.is_dir() else folder))


def ids_by(
    theirs: MistralTokenizer[Any, Any, Any, Any, Any],
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    **request: Any,
) -> list[int]:
    """The ids of a conversation by mistral-common, which need not be one that it would serve."""
    asked = [{key: value for key, value in message.items() if key != "prefix"} for message in messages]
    given = ChatCompletionRequest.from_openai(
        messages=asked, tools=tools, continue_final_message=messages[-1].get("prefix", False), **request
    )
    normal = theirs._instruct_request_normalizer.from_chat_completion_request(given)
    ids: list[int] = theirs.instruct_tokenizer.encode_instruct(normal).tokens
    return ids
