"""The tokenizer inside a GGUF file → the files a model folder has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m7mlx.errors import TokenizerError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types; sentencepiece counts them alike
_DIGITS_3 = r"\p{N}{1,3}"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": _SPLIT.replace("DIGITS", digits)}
    return [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, _byte_level(False)]


# tokenizer.ggml.pre → how the text is cut before the merges (llama.cpp, `llama-vocab.cpp`)
_PRE: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(True)],
    "default": [_byte_level(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    "llama-bpe": _split(_DIGITS_3),
    "llama3": _split(_DIGITS_3),
    "qwen2": _split(r"\p{N}"),
}


def tokenizer_files(path: Path, metadata: Mapping[str, Any]) -> dict[str, Path | bytes]:
    """File name → content. Raises TokenizerError for a kind that is not known."""
    values = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    tokens, types = values.get("tokens"), values.get("token_type")
    if not isinstance(tokens, list) or not tokens:
        raise TokenizerError(f"{path} holds no tokenizer; convert the original model instead")
    types = types or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise TokenizerError(f"{path}: {len(tokens)} tokens but {len(types)} token types")
    kind = values.get("model")
    files: dict[str, Path | bytes]
    if kind == "gpt2":
        files = {"tokenizer.json": _json_tokenizer(path, values, tokens, types)}
    elif kind == "llama":
        files = {"tokenizer.model": _sentencepiece(path, values, tokens, types)}
    else:
        raise TokenizerError(f"{path}: tokenizer {kind!r} is not supported; gpt2 (byte-level BPE) and llama are")
    settings: dict[str, Any] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        token = values.get(f"{name}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            settings[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[token]
    settings["add_bos_token"] = bool(values.get("add_bos_token", kind == "llama"))
    if metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    return files | {"tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2).encode()}


def _json_tokenizer(path: Path, values: Mapping[str, Any], tokens: list[str], types: list[int]) -> bytes:
    pre = values.get("pre", "default")
    if pre not in _PRE:
        raise TokenizerError(f"{path}: pre-tokenizer {pre!r} is not supported; {', '.join(_PRE)} are")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": tokens[i], **flags, "special": kind == _CONTROL}
        for i, kind in enumerate(types)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    data = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE[pre]},
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in values.get("merges", [])],
            "ignore_merges": pre in ("llama-bpe", "llama3"),
        },
    }
    return json.dumps(data, ensure_ascii=False).encode()


def _sentencepiece(path: Path, values: Mapping[str, Any], tokens: list[str], types: list[int]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    scores = values.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TokenizerError(f"{path}: its sentencepiece tokenizer has no score for each token")
    pb: Any = sentencepiece_model_pb2  # made at run time: type checkers see nothing in it
    model = pb.ModelProto()
    for piece, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = pb.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = True
    trainer.unk_id = values.get("unknown_token_id", 0)
    trainer.bos_id = values.get("bos_token_id", -1)
    trainer.eos_id = values.get("eos_token_id", -1)
    trainer.pad_id = -1
    # sentencepiece finds these pieces by name
    for field in ("unk", "bos", "eos"):
        token = getattr(trainer, f"{field}_id")
        if 0 <= token < len(tokens):
            setattr(trainer, f"{field}_piece", tokens[token])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(values.get("add_space_prefix", True))
    normalizer.remove_extra_whitespaces = bool(values.get("remove_extra_whitespaces", False))
    data: bytes = model.SerializeToString()
    return data
