"""The tokenizer inside a GGUF file, written as the files that a model folder has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m7mlx.errors import TokenizerError
from m7mlx.terminal import shown

# Token types; sentencepiece numbers them alike, but has no 0. User-defined ones are added tokens
# that are shown; which of them text may become is decided where the result is loaded.
_UNDEFINED, _NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = range(5)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [cut, _byte_level(False)]


# tokenizer.ggml.pre → how the text is cut before the merges, as in the models' own tokenizer.json
_PRE: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(True)],
    "default": [_byte_level(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    "llama-bpe": _split(_SPLIT.replace("DIGITS", r"\p{N}{1,3}")),
    "qwen2": _split(_SPLIT.replace("DIGITS", r"\p{N}")),
    "tekken": _split(_TEKKEN),
}
_WHOLE_FIRST = ("llama-bpe", "tekken")  # a piece that is a token is one, whatever the merges


def tokenizer_files(path: Path, metadata: Mapping[str, Any]) -> dict[str, Path | bytes]:
    """Return file name → content. Raises TokenizerError for a tokenizer that is not understood."""
    values = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    tokens: Any = values.get("tokens")
    types: Any = values.get("token_type")
    if not _is_list(tokens, str):
        raise TokenizerError(f"{path} holds no tokenizer; convert the original model instead")
    types = [_NORMAL] * len(tokens) if types is None else types
    if not _is_list(types, int) or len(types) != len(tokens):
        raise TokenizerError(f"{path}: its {len(tokens)} tokens have no type each")
    kind = values.get("model")
    files: dict[str, Path | bytes]
    if kind == "gpt2":
        files = {"tokenizer.json": _json_tokenizer(path, values, tokens, types)}
    elif kind == "llama":
        files = {"tokenizer.model": _sentencepiece(path, values, tokens, types)}
    else:
        raise TokenizerError(f"{path}: tokenizer {shown(kind)} is not supported; gpt2 (byte-level BPE) and llama are")
    settings: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = values.get(f"{name}_token_id")
        if type(token) is int and 0 <= token < len(tokens):
            settings[f"{key}_token"] = tokens[token]
    settings["add_bos_token"] = bool(values.get("add_bos_token", kind == "llama"))
    settings["add_eos_token"] = False
    settings["clean_up_tokenization_spaces"] = False
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return files | {"tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2).encode()}


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _json_tokenizer(path: Path, values: Mapping[str, Any], tokens: list[str], types: list[int]) -> bytes:
    pre: Any = values.get("pre")
    merges: Any = values.get("merges")
    if pre not in _PRE:
        raise TokenizerError(
            f"{path}: the way {shown(pre)} of cutting text (tokenizer.ggml.pre) is not supported; "
            f"{', '.join(_PRE)} are"
        )
    if not _is_list(merges, str) or any(" " not in merge for merge in merges):
        raise TokenizerError(f"{path}: its byte-level BPE tokenizer has no merges")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": kind in (_UNKNOWN, _CONTROL)}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise TokenizerError(f"{path}: a token stands twice in its vocabulary")
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE[pre]},
        "post_processor": _starter(values, tokens),
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [merge.split(" ", 1) for merge in merges],
            "ignore_merges": pre in _WHOLE_FIRST,
        },
    }
    return json.dumps(data, ensure_ascii=False).encode()


def _starter(values: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """Return what puts the start token first, for readers that ignore add_bos_token."""
    bos = values.get("bos_token_id")
    if not values.get("add_bos_token") or type(bos) is not int or not 0 <= bos < len(tokens):
        return None
    start, a, b = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}, *_sequences()
    return {
        "type": "TemplateProcessing",
        "single": [start, a],
        "pair": [start, a, start, b],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }


def _sequences() -> tuple[dict[str, Any], dict[str, Any]]:
    return {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}


def _sentencepiece(path: Path, values: Mapping[str, Any], tokens: list[str], types: list[int]) -> bytes:
    # protobuf is for such a tokenizer alone.
    from sentencepiece import sentencepiece_model_pb2

    scores: Any = values.get("scores")
    if not _is_list(scores, float) or len(scores) != len(tokens):
        raise TokenizerError(f"{path}: its sentencepiece tokenizer has no score for each token")
    pb: Any = sentencepiece_model_pb2  # made at run time: type checkers see nothing in it
    model = pb.ModelProto()
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    try:
        known = set(tokens)
        for token, score, kind in zip(tokens, scores, types, strict=True):
            # Spaces are written as such in user-defined tokens, and only there.
            piece = token.replace(" ", "▁") if kind == _USER_DEFINED else token
            piece = token if piece in known else piece
            model.pieces.add(piece=piece, score=score, type=kind or _NORMAL)
        trainer.unk_id = values.get("unknown_token_id", 0)
        trainer.bos_id = values.get("bos_token_id", -1)
        trainer.eos_id = values.get("eos_token_id", -1)
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: its sentencepiece tokenizer is damaged ({error})") from None
    trainer.pad_id = -1
    trainer.model_type = pb.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = True
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
