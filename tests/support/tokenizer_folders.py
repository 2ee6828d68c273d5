"""Folders with tokenizers, what they are compared with, and texts that are hard for them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer as MistralCommon
from models import MISTRAL_FILES, mistral_file
from sentencepiece import SentencePieceProcessor

from m7mlx.tokens.load import load_tokenizer
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tokens.tokenizer_json import _BYTE_OF

ORACLES = {v: MistralCommon(str(mistral_file(v))) for v in MISTRAL_FILES}
HARD = [
    "",
    " ",
    "  two",
    "trailing  ",
    "\n\n\t\r\n",
    "naïve café — “quotes”",
    "👩‍👩‍👧‍👦 🇫🇷 ☕",
    "你好，世界。日本語テキスト",
    "שלום עולם مرحبا",
    "</s><s>[INST] [/INST] <unk> [control_99] <0x41>",
    "▁already▁marked",
    "a\x00b\x7f\ufdd0\ufffd",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "def f(x):\n    return x  # tabs\tand spaces\n",
]
# Control tokens of a tokenizer.json, and whether it calls them special.
CONTROLS = {"<|im_start|>": True, "<|im_end|>": False, "</s>": True, "[INST]": False}


def added_token(name: str, special: bool = False) -> dict[str, Any]:
    """What a tokenizer's files say of an added token, but for its id."""
    return {"content": name, "special": special, "lstrip": False, "rstrip": False, "single_word": False,
            "normalized": False}  # fmt: skip


def byte_level_json(special: dict[str, bool]) -> dict[str, Any]:
    """A byte-level tokenizer of 256 bytes and some added tokens (name → special)."""
    vocab = {char: byte[0] for char, byte in _BYTE_OF.items()}
    added = [{"id": 256 + n, **added_token(name, is_special)} for n, (name, is_special) in enumerate(special.items())]
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocab | {a["content"]: a["id"] for a in added}, "merges": []},
    }


def bpe_json_of(model: Path) -> dict[str, Any]:
    """Mistral's tokenizer.model as transformers would write it to a tokenizer.json."""
    sp = SentencePieceProcessor(model_file=str(model))
    size = sp.get_piece_size()
    pieces = [sp.id_to_piece(i) for i in range(size)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        splits = [(piece[:n], piece[n:]) for n in range(1, len(piece)) if {piece[:n], piece[n:]} <= vocab.keys()]
        merges += [(-sp.get_score(vocab[piece]), vocab[a], vocab[b], a, b) for a, b in splits]
    merges.sort()
    added = [{"id": i, **added_token(pieces[i], True)} for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
    prepend = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": prepend},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "vocab": vocab,
            "merges": [[a, b] for _, _, _, a, b in merges],
        },
    }  # fmt: skip


def write_files(folder: Path, files: Mapping[str, Any]) -> Path:
    """Write files by their names: bytes as they are, all else as JSON."""
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)
    return folder


def write_json_tokenizer(folder: Path, data: dict[str, Any], settings: dict[str, Any] | None = None) -> Tokenizer:
    """Write a tokenizer.json and its settings, and load them."""
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    return load_tokenizer(folder)


def transformers_tokenizer(folder: Path) -> Any:
    """Load what `transformers` makes of a folder's tokenizer."""
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)


def write_transformers_tokenizer(folder: Path) -> None:
    """Write a tokenizer that transformers, and so mlx-lm, can load."""
    (folder / "tokenizer.json").write_text(json.dumps(bpe_json_of(mistral_file("v1"))))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}'
    )
